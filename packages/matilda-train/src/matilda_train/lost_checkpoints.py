"""What a run's events say was saved, held against the checkpoints that are there.

A run that has saved never begins from scratch by itself: checkpoints that were deleted, left out of
a copy, or lie on a disk that is not mounted are named, and a person decides.
"""

from __future__ import annotations

from pathlib import Path

from matilda_ckpt import Checkpointer, NoValidCheckpointError, Restored
from matilda_train.metrics_log import EventLog, read_rows

__all__ = ["describe_lost", "finished_step"]


def finished_step(run_dir: Path) -> int | None:
    """The step that the run finished at; None while it has something to do.

    That is so, too, where its last checkpoint is damaged or gone and an older one is there. Without
    any checkpoint the events are believed: metrics alone may have been kept.
    """
    finish = EventLog(run_dir / "events.jsonl").last("finish")
    if finish is None or not isinstance(finish.get("step"), int):
        return None
    step: int = finish["step"]
    found = Checkpointer(run_dir / "checkpoints", read_only=True).list()
    intact = [i.step for i in found if i.problem is None or i.other_format or i.unreadable]
    return step if not found or max(intact, default=-1) >= step else None


def describe_lost(run_dir: Path, restored: Restored | None) -> list[str]:
    """A sentence for each saved checkpoint that the run should have gone on from and could not.

    Raises `NoValidCheckpointError` where the run has saved and nothing could be `restored`.
    """
    saved, steps = None, []
    for event in read_rows(run_dir / "events.jsonl"):
        if event.get("event") == "save" and isinstance(event.get("step"), int):
            saved = event["step"]
            steps.append(saved)
        elif event.get("event") == "rollback":
            saved = None  # what the rollback undid is passed over on purpose
    if restored is None:
        if not steps:
            return []
        raise NoValidCheckpointError(
            f"The run saved step {steps[-1]}, as its `events.jsonl` says, but "
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
