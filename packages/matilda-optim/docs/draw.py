"""Draws the README's figures as SVG, with nothing but the standard library and this package.

python docs/draw.py schedules > docs/schedules.svg
python docs/draw.py losses RESULTS.json > docs/muon_vs_adamw.svg   # of benchmarks/muon_vs_adamw.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

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


def losses(results: Path) -> str:
    report = json.loads(results.read_text())
    curves: list[Curve] = []
    for algorithm, lr in report["best_lr"].items():
        for trial in report["trials"]:
            key = (trial["algorithm"], trial["lr"], trial["seed"], trial["steps"])
            if key == (algorithm, lr, 0, report["steps"]):
                curves.append((f"{algorithm}, lr {lr:g}", trial["curve"]))
    rates: list[Curve] = []
    full = [t for t in report["trials"] if t["seed"] == 0 and t["steps"] == report["steps"]]
    for algorithm in report["best_lr"]:
        mine = sorted((t["lr"], t["loss"]) for t in full if t["algorithm"] == algorithm)
        rates.append((algorithm, [(i, loss) for i, (_, loss) in enumerate(mine)]))
    low = min(t["loss"] for t in full) - 0.1
    return figure(
        [
            panel(0, "validation loss, best rate", curves, low, 7.0, "steps"),
            panel(310, "final loss over the grid of rates", rates, low, low + 2.0, "th rate"),
        ],
        lines=2,
    )


if __name__ == "__main__":
    which, *rest = sys.argv[1:]
    sys.stdout.write(schedules() if which == "schedules" else losses(Path(rest[0])))
