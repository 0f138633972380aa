"""How a learning rate becomes the size of an orthogonal update: one ratio per matrix shape."""

from __future__ import annotations

import math

ADJUST_LR_FNS: tuple[str, ...] = ("original", "match_rms_adamw", "spectral_unclamped")


def check_adjust_lr_fn(name: str | None) -> None:
    """Raises ValueError unless `name` is None or one of `ADJUST_LR_FNS`."""
    if name is not None and name not in ADJUST_LR_FNS:
        raise ValueError(
            f"`adjust_lr_fn` {name!r} is unknown; use one of {', '.join(map(repr, ADJUST_LR_FNS))}"
        )


def lr_ratio(adjust_lr_fn: str | None, rows: int, cols: int) -> float:
    """What the learning rate of a (rows = fan-out, cols = fan-in) matrix is multiplied by.

    None and "original": √max(1, rows/cols) (Keller Jordan). "match_rms_adamw": 0.2·√max(rows, cols)
    (Moonlight, arXiv 2502.16982), an update RMS of 0.2 whatever the shape, which makes AdamW's
    learning rates and decay fit. "spectral_unclamped": √(rows/cols) (Bernstein).
    """
    check_adjust_lr_fn(adjust_lr_fn)
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    if adjust_lr_fn == "spectral_unclamped":
        return math.sqrt(rows / cols) if cols else 1.0
    return math.sqrt(max(1.0, rows / cols)) if cols else 1.0


def convert_lr(
    lr: float,
    weight_decay: float,
    *,
    source: str | None,
    target: str | None,
    shape: tuple[int, int],
) -> tuple[float, float]:
    """The `(lr, weight_decay)` under `target` that gives the same steps as under `source`.

    Exact for one matrix `shape` (rows, cols): both the update `lr·ratio` and the decay per step
    `lr·weight_decay` are kept, so the decay is rescaled by the inverse.

    Raises:
        ValueError: unknown convention.
    """
    factor = lr_ratio(source, *shape) / lr_ratio(target, *shape)
    return lr * factor, weight_decay / factor
