"""Draws the README's figure as SVG, with nothing but the standard library and this package.

python docs/draw.py > docs/schedules.svg
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from matilda_optim import cosine, linear_to_zero, momentum_warmup, wsd

COLOURS = ("#0b6fb8", "#d1495b", "#3a7d44", "#edae49", "#6b4e9b", "#555555")
Curve = tuple[str, Sequence[tuple[float, float]]]


def panel(
    left: int, title: str, curves: Sequence[Curve], low: float, high: float, unit: str
) -> list[str]:
    """One plot, 300 × 190 pixels, with its legend."""
    right = max(x for _, points in curves for x, _ in points)
    parts = [
        f'<text x="{left + 40}" y="16" font-weight="bold">{title}</text>',
        f'<path d="M{left + 40} 25V165H{left + 290}" fill="none" stroke="#888"/>',
        f'<text x="{left + 34}" y="30" text-anchor="end">{high:g}</text>',
        f'<text x="{left + 34}" y="168" text-anchor="end">{low:g}</text>',
        f'<text x="{left + 290}" y="180" text-anchor="end">{right:g} {unit}</text>',
    ]
    for i, (name, points) in enumerate(curves):
        path = " ".join(
            f"{left + 40 + 250 * x / right:.1f},"
            f"{165 - 140 * (min(max(y, low), high) - low) / (high - low):.1f}"
            for x, y in points
        )
        colour = COLOURS[i % len(COLOURS)]
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        parts.append(f'<text x="{left + 46}" y="{198 + 14 * i}" fill="{colour}">{name}</text>')
    return parts


def figure(panels: Sequence[list[str]], lines: int) -> str:
    width, height = 310 * len(panels), 200 + 14 * lines
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *[part for parts in panels for part in parts],
            "</svg>\n",
        ]
    )


def schedules() -> str:
    steps = range(0, 1001, 5)
    stable = partial(wsd, total_steps=1000, warmup_steps=50, decay_steps=300)
    rates: list[Curve] = [
        (
            f'wsd(decay_steps=300, shape="{shape}")',
            [(t, stable(t, shape=shape)) for t in steps[:-1]],
        )
        for shape in ("linear", "1-sqrt", "exponential", "power")
    ]
    others: list[Curve] = [
        (
            "cosine(final=0.1)",
            [(t, cosine(t, total_steps=1000, warmup_steps=50)) for t in steps[:-1]],
        ),
        (
            "linear_to_zero",
            [(t, linear_to_zero(t, total_steps=1000, warmup_steps=50)) for t in steps[:-1]],
        ),
    ]
    momentum: list[Curve] = [
        (
            "momentum_warmup(warmup_steps=300)",
            [(t, momentum_warmup(t, warmup_steps=300)) for t in steps],
        )
    ]
    return figure(
        [
            panel(0, "learning rate: WSD, four decays", rates, 0.0, 1.0, "steps"),
            panel(310, "learning rate: one decay", others, 0.0, 1.0, "steps"),
            panel(620, "momentum", momentum, 0.8, 1.0, "steps"),
        ],
        lines=4,
    )


if __name__ == "__main__":
    sys.stdout.write(schedules())
