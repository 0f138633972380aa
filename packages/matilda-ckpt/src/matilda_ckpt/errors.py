"""Typed errors: each message is one sentence that names the file and what was kept."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """Base of everything this package raises for the environment (disk, damage, other writers).

    Mistakes of the caller (a bad argument, a state that cannot be stored) are `ValueError`s.
    """


class SaveError(CheckpointError):
    """A save did not become durable; earlier checkpoints are untouched."""


class NotFiniteError(SaveError):
    """A state with a NaN or infinite element was not saved, as `nonfinite="refuse"` asks."""


class DamagedError(CheckpointError):
    """A checkpoint failed verification; the message names the file and what is wrong with it."""


class OtherFormatError(CheckpointError):
    """A checkpoint is of another version of the format, its seal intact; it stays where it is."""


class UnreadableError(CheckpointError):
    """A checkpoint could not be read for a reason that says nothing of its content: rights, too
    many open files, memory, a timeout, the way to an object store. It stays where it is.
    """


class LockedError(CheckpointError):
    """Another live process is writing to the same directory, or has taken it over."""


class NoValidCheckpointError(CheckpointError):
    """Checkpoints exist, but none of them is verified and healthy."""
