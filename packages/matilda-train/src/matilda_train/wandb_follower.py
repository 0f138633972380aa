"""Follows a run's `metrics.jsonl` and sends its rows to W&B; a process beside the run's own.

`python -m matilda_train.wandb_follower RUN_DIR PROJECT`, started by `WandbMirror`. It lives until
its standard input ends, which the death of the training process brings about too.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matilda_train.run_dir import RunDir
from matilda_train.stop_signals import STOP_SIGNALS

__all__ = ["follow", "main"]

POLL_SECONDS = 1.0
LONGEST_FINISH_SECONDS = 300.0


def main() -> None:
    """Follow the run named on the command line to its end."""
    run_dir, project = Path(sys.argv[1]), sys.argv[2]
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ended = threading.Event()
    threading.Thread(target=_await_end, args=(ended,), daemon=True).start()
    # One follower at a time: the one of a life that was killed may still be at its last rows.
    with (run_dir / "wandb" / "follower.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        follow(run_dir, project, ended)


def follow(run_dir: Path, project: str, ended: threading.Event) -> None:
    """Send rows as they come, until `ended` is set and none is left."""
    folder = run_dir / "wandb"
    run, sent = _open_run(run_dir, project)
    for row in follow_rows(run_dir / "metrics.jsonl", ended):
        if row["step"] < sent:
            continue
        values = {
            name: value
            for name, value in row.items()
            if value is not None and not isinstance(value, str)
        }
        run.log(values, step=row["step"])
        sent = row["step"]  # W&B never goes back: steps redone after a rollback are in the file
        (folder / "sent.txt").write_text(str(row["step"]), encoding="utf-8")
    run.finish()


def follow_rows(path: Path, ended: threading.Event) -> Iterator[dict[str, Any]]:
    """Whole rows of a growing file, from its beginning until `ended` is set and it stands still.

    A file that another takes the place of, as in a rollback, is left for that one.
    """
    while True:
        with path.open(encoding="utf-8", errors="replace") as file:
            begun, replaced = "", False
            while not replaced:
                last = ended.is_set()
                for line in file:
                    begun += line
                    if not begun.endswith("\n"):
                        continue
                    try:
                        row = json.loads(begun)
                    except json.JSONDecodeError:
                        row = None
                    begun = ""
                    if isinstance(row, dict) and isinstance(row.get("step"), int):
                        yield row
                replaced = path.stat().st_ino != os.fstat(file.fileno()).st_ino
                if last and not replaced:
                    return
                ended.wait(0 if replaced else POLL_SECONDS)


def _open_run(run_dir: Path, project: str) -> tuple[Any, int]:
    """The W&B run of this run's id, and the first step that it has not got yet."""
    import wandb

    description = RunDir.read(run_dir)
    options: dict[str, Any] = {
        "project": project,
        "id": description["run_id"],
        "name": run_dir.name,
        "resume": "allow",
        "dir": str(run_dir),
        "config": {"config_sha256": description["config_sha256"], **description["config"]},
    }
    settings = {"console": "off", "silent": True}
    try:
        run = wandb.init(**options, settings=wandb.Settings(**settings))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        (run_dir / "wandb" / "status.txt").write_text(
            f"Weights & Biases could not be reached ({reason[0]}); `wandb sync "
            f"{run_dir}/wandb/offline-run-*` sends what was kept for it",
            encoding="utf-8",
        )
        # wandb's service still thinks that it has a run of this id.
        wandb.teardown()
        run = wandb.init(**options, settings=wandb.Settings(**settings, mode="offline"))
    if not run.settings._offline:
        return run, int(run.step)
    record = run_dir / "wandb" / "sent.txt"
    return run, int(record.read_text(encoding="utf-8")) if record.is_file() else 0


def _await_end(ended: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    ended.set()
    time.sleep(LONGEST_FINISH_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
