"""What a run's events say was saved, held against the checkpoints that are there.

A run that has saved never begins from scratch by itself: checkpoints that were deleted, left out of
a copy, or lie on a disk that is not mounted are named, and a person decides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from matilda_ckpt import Checkpointer, NoValidCheckpointError, Restored, verify
from matilda_train.metrics_log import EventLog, read_rows

__all__ = ["describe_lost", "finished_step"]

PATIENCE_SECONDS = 2.0


def finished_step(run_dir: Path, note: Callable[[str], None]) -> int | None:
    """The step that the run finished at; None while it has something to do.

    It has where its last checkpoint is damaged, of which every byte is hashed, or gone. Without any
    checkpoint, set aside ones included, the events are believed: metrics alone may have been kept.
    `note` is told when the hashing takes long.
    """
    finish = EventLog(run_dir / "events.jsonl").last("finish")
    if finish is None or not isinstance(finish.get("step"), int):
        return None
    step: int = finish["step"]
    folder = run_dir / "checkpoints"
    found = Checkpointer(folder, read_only=True).list()
    if not found:
        set_aside = any(folder.glob(f"quarantine/step-{step:08d}[-.]*"))
        return None if set_aside else step
    last = [info for info in found if info.step >= step]
    if any(info.other_format or info.unreadable for info in last):
        return step
    size = sum(info.bytes for info in last) / 1e9
    slow = threading.Timer(
        PATIENCE_SECONDS, note, [f"the run has finished; its last {size:.1f} GB are being verified"]
    )
    slow.start()
    try:
        return step if any(info.problem is None and verify(info.path).ok for info in last) else None
    finally:
        slow.cancel()


def describe_lost(run_dir: Path, restored: Restored | None) -> list[str]:
    """A sentence for each saved checkpoint that the run should have gone on from and could not.

    Raises `NoValidCheckpointError` where the run has saved and nothing could be `restored`.
    """
    saved, steps = None, []
    for event in read_rows(run_dir / "events.jsonl"):
        if event.get("event") == "save" and isinstance(event.get("step"), int):
            saved = event["step"]
            steps.append(saved)
        elif event.get("event") == "decay" and isinstance(event.get("parent"), dict):
            saved = event["parent"].get("step")  # it began with a copy of its parent's checkpoint
            steps += [saved] if isinstance(saved, int) else []
        elif event.get("event") == "rollback":
            saved = None  # what the rollback undid is passed over on purpose
    if restored is None:
        if not steps:
            return []
        raise NoValidCheckpointError(
            f"The run had a checkpoint of step {steps[-1]}, as its `events.jsonl` says, but "
            f"{str(run_dir / 'checkpoints')!r} holds no checkpoint any more; bring them back (a "
            "disk that is not mounted, a copy that is not whole?), or start anew in another "
            "`--run-dir`"
        )
    moved = [skip for skip in restored.skipped if skip.moved_to is not None]
    lost = [f"{skip.reason}; it is now {str(skip.moved_to)!r}" for skip in moved]
    if saved is not None and saved > restored.step and all(skip.step < saved for skip in moved):
        lost.append(
            f"the checkpoint of step {saved:,} is gone: the steps after {restored.step:,} are "
            "done again"
        )
    return lost
