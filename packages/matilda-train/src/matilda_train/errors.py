"""What the loop raises, apart so that telling errors from each other needs no torch."""

from __future__ import annotations

__all__ = ["TrainingDivergedError"]


class TrainingDivergedError(RuntimeError):
    """Loss or gradient was not finite for `train.max_consecutive_skips` steps in a row."""

    def __init__(self, step: int, skips: int) -> None:
        super().__init__(
            f"Loss or gradient was not finite in {skips} steps in a row, up to step {step}; the "
            "newest checkpoint stands. Lower `optim.lr` in a new `--run-dir`, or look at the data "
            "of those steps."
        )
