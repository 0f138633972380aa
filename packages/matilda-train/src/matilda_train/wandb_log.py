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

__all__ = ["WandbMirror", "require_wandb"]

PATIENCE_SECONDS = 5.0


def require_wandb() -> None:
    """Raise `ValueError` when wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "`log.wandb` is true, but wandb is not installed; install it with `pip install "
            "'matilda-train[wandb]'`, or set `log.wandb=false`."
        )


class WandbMirror:
    """Sends a run's metrics rows to one W&B run whose id is the run's own, over all its restarts.

    Where W&B cannot be reached, the rows are kept under `wandb/` for `wandb sync`.
    """

    def __init__(self, config: LogConfig, run_dir: Path, note: Callable[[str], None]) -> None:
        """Opened when `metrics.jsonl` is; `note` hears at the end if something is amiss."""
        require_wandb()
        self._note = note
        self._folder = run_dir / "wandb"
        self._folder.mkdir(exist_ok=True)
        self._status = self._folder / "status.txt"
        self._status.unlink(missing_ok=True)
        with (self._folder / "follower.log").open("ab") as log:
            self._follower = subprocess.Popen(
                [
                    *(sys.executable, "-m", "matilda_train.wandb_follower"),
                    *(str(run_dir.resolve()), config.wandb_project),
                ],
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
