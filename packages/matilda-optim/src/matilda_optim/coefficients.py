"""Newton–Schulz coefficient sets: frozen constants, one odd quintic `a·x + b·x³ + c·x⁵` a step.

The generator (Polar Express, Amsel et al., arXiv 2505.16932) lives in the tests, which prove each
frozen set equal to what it produces for the interval stated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Quintic = tuple[float, float, float]

KELLER: Quintic = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's tuple, used at every step; the default of `torch.optim.Muon`."""

# Optimal on σ ∈ [1e-3, 1] with a 0.5 % safety factor on all steps but the last: the smallest that
# stays bounded when bf16 rounding lifts σ above 1. Peers copy a 2 % list, which ends 15 % off.
_POLAR_EXPRESS_5: tuple[Quintic, ...] = (
    (8.27829414467713, -23.5051078795441, 17.0996572677384),
    (4.10222288584687, -2.93630642985662, 0.538501926152816),
    (3.94190428196808, -2.89662401105956, 0.54535831638862),
    (3.29396830947152, -2.44566771224976, 0.496829342789609),
    (2.29377602861982, -1.66272774337628, 0.418140054846777),
)

# Optimal on σ ∈ [2e-3, 1]: ends within 2.5 % of 1 for σ ≥ 3e-3, at a lower slope at zero.
_POLAR_EXPRESS_TIGHT_5: tuple[Quintic, ...] = (
    (8.24400108449754, -23.4077373265106, 17.0288214692654),
    (4.0498581025884, -2.92299152884996, 0.540529086228361),
    (3.7087534921906, -2.74586799094101, 0.530581083481113),
    (2.78920367607877, -2.06082218643238, 0.45393261275781),
    (2.00059873537631, -1.38343314617202, 0.388573572217361),
)

# Optimal on σ ∈ [5e-3, 1] for four steps: 20 % less work.
_POLAR_EXPRESS_4: tuple[Quintic, ...] = (
    (8.1428148705114, -23.1204326192726, 16.8198110681919),
    (3.90010354009635, -2.88080170081343, 0.545794472084723),
    (3.16890651049593, -2.35264936477256, 0.486411817203552),
    (2.1964799572394, -1.57375981287403, 0.408584991755059),
)

PRESETS: dict[str, tuple[Quintic, ...]] = {
    "keller": (KELLER,),
    "polar_express": _POLAR_EXPRESS_5,
    "polar_express_tight": _POLAR_EXPRESS_TIGHT_5,
    "polar_express_4": _POLAR_EXPRESS_4,
}
"""Named sets. `"keller"` repeats its one tuple; the others hold one tuple per step."""


def resolve_coefficients(
    coefficients: str | Sequence[float] | Sequence[Sequence[float]], steps: int
) -> tuple[Quintic, ...]:
    """The quintic of each of `steps` iterations.

    `coefficients` is a preset's name, one `(a, b, c)` for every step (as `torch.optim.Muon` takes
    it), or a list of tuples, one a step. A list shorter than `steps` repeats its last tuple, which
    keeps converging; a longer one is cut.

    Raises:
        ValueError: unknown name, wrong tuple length, or `steps` outside 1–99.
    """
    if not 1 <= steps < 100:
        raise ValueError(f"`ns_steps` must be from 1 to 99, got {steps!r}")
    rows: list[Any]
    if isinstance(coefficients, str):
        if coefficients not in PRESETS:
            raise ValueError(
                f"`ns_coefficients` {coefficients!r} is not a preset; use one of "
                f"{', '.join(map(repr, PRESETS))} or give the tuples"
            )
        rows = list(PRESETS[coefficients])
    else:
        rows = list(coefficients)
        if len(rows) == 3 and all(isinstance(item, int | float) for item in rows):
            rows = [rows]
    if not rows or any(not isinstance(row, list | tuple) or len(row) != 3 for row in rows):
        raise ValueError(
            "`ns_coefficients` must be a preset's name, one (a, b, c) or a list of (a, b, c)"
        )
    quintics = [(float(row[0]), float(row[1]), float(row[2])) for row in rows]
    return tuple(quintics[min(i, len(quintics) - 1)] for i in range(steps))
