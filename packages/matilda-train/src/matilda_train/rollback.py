"""Rollbacks: a spike makes the run return to a checkpoint before it and leave out its samples.

A rollback is decided by one line in `events.jsonl`. Whatever reads that line, the process that
wrote it or one started after a kill, does the same: it leaves the samples out, restores the newest
checkpoint that the rollback did not undo, and trains on. So the rest of the run is a function of
the line alone, whichever checkpoint there was to return to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

from matilda_train.config import RunConfig
from matilda_train.data_source import TokenStream
from matilda_train.errors import TrainingDivergedError
from matilda_train.metrics_log import EventLog, read_rows

__all__ = ["Rollback", "Rollbacks", "is_restorable", "read_rollbacks"]


class Saved(Protocol):
    """What is asked of a checkpoint; `matilda_ckpt.CheckpointInfo` has it."""

    @property
    def step(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def healthy(self) -> bool: ...
    @property
    def problem(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """One rollback, as its event has it."""

    step: int
    """The spike's step, counted from 1."""
    undone_from: int
    """First step that is undone: the run returns to a state before it."""
    sequence: int
    """Sequence number of the newest checkpoint then; later ones come after the rollback."""
    skip_from: int
    """First sample that is left out, in the data's unskipped order."""
    skip_to: int
    """The sample after the last one left out."""


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """The rollbacks of a run, oldest first; `ValueError` when one cannot be understood."""
    names = [field.name for field in fields(Rollback)]
    file = run_dir / "events.jsonl"
    rows = [row for row in read_rows(file) if row.get("event") == "rollback"]
    try:
        return [Rollback(**{name: int(row[name]) for name in names}) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(file)!r} tells of a rollback that cannot be understood ({error!r}); restore "
            "the file from a backup, or start anew in another `--run-dir`."
        ) from None


def is_restorable(
    saved: Saved, rollbacks: Sequence[Rollback], undone_by: Rollback | None = None
) -> bool:
    """Whether a run with these rollbacks behind it may go on from a checkpoint.

    `undone_by` is the rollback after them, for looking at what the run was before that.
    """
    if undone_by is not None and saved.sequence > undone_by.sequence:
        return False
    return all(saved.sequence > r.sequence or saved.step < r.undone_from for r in rollbacks)


class Rollbacks:
    """The rollbacks of a run in progress; every rank holds the same."""

    def __init__(
        self, run_dir: Path, config: RunConfig, stream: TokenStream, events: EventLog
    ) -> None:
        """Reads what the run's events tell, and makes `stream` leave out those samples."""
        self._config = config
        self._stream = stream
        self._events = events
        self._done = read_rollbacks(run_dir)
        for rollback in self._done:
            stream.leave_out(rollback.skip_from, rollback.skip_to)

    def __len__(self) -> int:
        return len(self._done)

    def accept(self, saved: Saved) -> bool:
        """Whether the run may go on from this checkpoint."""
        return is_restorable(saved, self._done)

    def decide(self, step: int, found: Sequence[Saved]) -> bool:
        """Roll back because of a spike in `step`, counted from 1, or not.

        True: it is in the events, durably, and the stream, which nobody may be reading, leaves the
        samples out; the caller restores. False: none of the checkpoints in `found` is old enough.
        Raises `TrainingDivergedError` after `train.max_rollbacks`.
        """
        train, plan = self._config.train, self._config.plan
        undone_from = max(1, step - train.rollback_margin_steps)
        first = plan.samples(undone_from - 1)
        stop = plan.samples(step + train.rollback_margin_steps)
        skip_from, skip_to = self._stream.original(first, stop - first)
        rollback = Rollback(
            step=step,
            undone_from=undone_from,
            sequence=max((saved.sequence for saved in found), default=0),
            skip_from=skip_from,
            skip_to=skip_to,
        )
        usable = [saved for saved in found if saved.healthy and saved.problem is None]
        if not any(is_restorable(saved, [*self._done, rollback]) for saved in usable):
            return False
        if len(self._done) >= train.max_rollbacks:
            self._events.write("diverged", step=step)
            raise TrainingDivergedError(
                f"Loss or gradient norm spiked again in step {step}, after {len(self._done)} "
                "rollbacks (`train.max_rollbacks`)"
            )
        self._events.write("rollback", **asdict(rollback))
        self._done.append(rollback)
        self._stream.leave_out(skip_from, skip_to)
        return True
