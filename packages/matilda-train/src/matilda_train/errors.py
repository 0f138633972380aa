"""What the loop raises, apart so that telling errors from each other needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["TrainingDivergedError", "is_out_of_memory", "naming"]


class TrainingDivergedError(RuntimeError):
    """The run cannot go on by itself; `reason` says what happened, as the start of a sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}; the newest checkpoint stands. Lower `optim.lr` in a new `--run-dir`, or "
            "look at the data of those steps (`apps/trace.py`, `autopsies/` in the run directory)."
        )


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Name the file in an `OSError` that names none, as that of a write to a full disk does."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's or the CPU's allocator found no room; torch has a class for the former only.

    Told by names, for this must work where torch is not loaded.
    """
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs))
    )
