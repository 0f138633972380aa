"""What the loop raises, apart so that telling errors from each other needs no torch."""

from __future__ import annotations

__all__ = ["TrainingDivergedError"]


class TrainingDivergedError(RuntimeError):
    """The run cannot go on by itself; `reason` says what happened, as the start of a sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}; the newest checkpoint stands. Lower `optim.lr` in a new `--run-dir`, or "
            "look at the data of those steps (`apps/trace.py`, `autopsies/` in the run directory)."
        )
