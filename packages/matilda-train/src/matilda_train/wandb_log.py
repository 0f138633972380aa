"""Weights & Biases as a mirror of `metrics.jsonl`, kept by a process of its own.

The training process never imports wandb and never waits for it: `wandb_follower` reads the file as
it grows. What the network does is its business alone.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from matilda_train.config import LogConfig
from matilda_train.metrics_log import read_rows

__all__ = ["WandbMirror", "has_unsent_rows", "require_wandb"]

PATIENCE_SECONDS = 5.0
MOST_RESTARTS = 5


def require_wandb() -> None:
    """Raise `ValueError` when wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "`log.wandb` is true, but wandb is not installed; install it with `pip install "
            "'matilda-train[wandb]'`, or set `log.wandb=false`."
        )


def has_unsent_rows(run_dir: Path) -> bool:
    """Whether the follower has ended before the metrics did."""
    rows = read_rows(run_dir / "metrics.jsonl")
    file = run_dir / "wandb" / "sent.txt"
    try:
        sent = int(file.read_text(encoding="utf-8")) if file.exists() else -1
    except ValueError:
        sent = -1
    return bool(rows) and int(rows[-1].get("step", 0)) > sent


class WandbMirror:
    """Sends a run's metrics rows to one W&B run whose id is the run's own, over all its restarts.

    Where W&B cannot be reached, the rows are kept under `wandb/` for `wandb sync`.
    """

    def __init__(self, config: LogConfig, run_dir: Path, note: Callable[[str], None]) -> None:
        """Opened when `metrics.jsonl` is; `note` hears if something is amiss."""
        require_wandb()
        self._note = note
        self._folder = run_dir / "wandb"
        self._folder.mkdir(exist_ok=True)
        self._status = self._folder / "status.txt"
        self._status.unlink(missing_ok=True)
        self._arguments = str(run_dir.resolve()), config.wandb_project
        self._restarts = 0
        self._follower = self._start()

    def look(self) -> None:
        """Start the follower again if it has died; it goes on after the last row that was sent."""
        if self._follower.poll() is None or self._restarts == MOST_RESTARTS:
            return
        self._restarts += 1
        assert self._follower.stdin is not None
        self._follower.stdin.close()
        self._note(
            f"Weights & Biases' process has ended ({self._follower.returncode}); it is started "
            f"again, see {self._folder}/follower.log"
        )
        self._follower = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with (self._folder / "follower.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "matilda_train.wandb_follower", *self._arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # A signal to the run's group is for the run: the follower ends when its pipe does.
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def close(self) -> None:
        """There will be no more rows; gives the follower a few seconds, then leaves it to itself.

        It ends within minutes whatever happens.
        """
        assert self._follower.stdin is not None
        self._follower.stdin.close()
        try:
            code = self._follower.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._follower.returncode = 0  # not ours to wait for any more
            self._note(f"Weights & Biases is still being sent to; see {self._folder}/follower.log")
            return
        if code != 0:
            self._note(f"Weights & Biases has failed; see {self._folder}/follower.log")
        elif self._status.is_file():
            self._note(self._status.read_text(encoding="utf-8").strip())
