"""The loss of a run, or of several, as an SVG for a README: no script, and for light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from matilda_train.report.run_record import RunRecord, name_runs, read_run
from matilda_train.run_dir import check_output, write_output

__all__ = ["draw_loss", "loss_picture"]

WIDTH, HEIGHT = 960, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 40, 48
COLOURS = ("#2f81d6", "#d55e00", "#009e73", "#b0528f")
GREY = "#76818f"
SMOOTHED = 100
"""The smoothed line is a mean over the rows around: one in this many to either side, at least 1."""

BEFORE_IT_FALLS = 0.02
"""Share of the tokens whose loss is above the picture: the fall from the first step is not news."""

MOST_TOLD = 3
"""Stops that are told in words, each on a line of its own; further ones are only marked."""


@dataclass(frozen=True)
class Axis:
    """One direction of the picture."""

    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round numbers, five to ten of them."""
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        size *= next(factor for factor in (5, 2, 1) if factor * size <= rough)
        first, last = math.ceil(self.low / size - 1e-9), math.floor(self.high / size + 1e-9)
        return [number * size for number in range(first, last + 1)]


def draw_loss(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the picture of these run directories' loss to `out`, whole or not at all.

    Against tokens: training loss, thin and smoothed, held-out loss as rings, and a cross where a
    process ended before the run did. Equal runs give equal bytes. Raises `ValueError` for a
    directory that holds no run, for an `out` that cannot be a file, and for runs without two
    logged steps.
    """
    if not runs:
        raise ValueError("A picture needs at least one run directory.")
    paths = [Path(run) for run in runs]
    records = [read_run(path, name) for path, name in zip(paths, name_runs(paths), strict=True)]
    out = Path(out)
    check_output(out, "--svg")
    write_output(out, loss_picture(records))
    return out


def loss_picture(records: Sequence[RunRecord]) -> str:
    """The SVG."""
    curves = [_points(record.columns(), "loss_nats") for record in records]
    if not any(len(curve) > 1 for curve in curves):
        raise ValueError("There is no loss to draw: no run has two logged steps yet.")
    x = Axis(0.0, max(curve[-1][0] for curve in curves if curve), LEFT, WIDTH - RIGHT)
    shown = [loss for c in curves for tokens, loss in c if tokens >= BEFORE_IT_FALLS * x.high]
    low, high = min(shown), max(shown)
    margin = 0.04 * (high - low) or 0.1
    y = Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="13" fill="{GREY}" role="img">',
        f"<title>Loss of {escape(', '.join(record.name for record in records))}</title>",
        *_frame(x, y),
    ]
    told = 0
    for number, (record, curve) in enumerate(zip(records, curves, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        held_out = _points(record.evaluation_columns(), "val_loss_nats")
        parts += [
            _line(curve, x, y, f'stroke="{colour}" opacity="0.35"'),
            _line(_smoothed(curve), x, y, f'stroke="{colour}" stroke-width="2"'),
            *_rings([point for point in held_out if y.low <= point[1] <= y.high], x, y, colour),
        ]
        stops = [mark for mark in record.marks if mark["kind"] in ("kill", "stop")]
        for mark in stops:
            parts += _stop(mark, x, told if told < MOST_TOLD else None)
            told += 1
    names = [record.name for record in records] if len(records) > 1 else ["training loss"]
    return "\n".join([*parts, _legend(names), "</svg>\n"])


def _points(columns: dict[str, list[Any]], field: str) -> list[tuple[float, float]]:
    pairs = zip(columns.get("tokens", ()), columns.get(field, ()), strict=False)
    return [
        (float(tokens), float(loss))
        for tokens, loss in pairs
        if isinstance(tokens, int | float) and isinstance(loss, int | float)
    ]


def _smoothed(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of as many points to either side, so that the line does not lag; fewer at the ends."""
    sums = list(accumulate((loss for _, loss in curve), initial=0.0))
    half, last = max(1, len(curve) // SMOOTHED), len(curve) - 1
    smoothed = []
    for number, (tokens, _) in enumerate(curve):
        reach = min(half, number, last - number)
        total = sums[number + reach + 1] - sums[number - reach]
        smoothed.append((tokens, total / (2 * reach + 1)))
    return smoothed


def _line(points: Sequence[tuple[float, float]], x: Axis, y: Axis, style: str) -> str:
    inside = [(tokens, loss) for tokens, loss in points if loss <= y.high]
    path = "L".join(f"{x.at(tokens):.1f} {y.at(loss):.1f}" for tokens, loss in inside)
    return f'<path d="M{path}" fill="none" stroke-linejoin="round" {style}/>' if inside else ""


def _rings(points: Sequence[tuple[float, float]], x: Axis, y: Axis, colour: str) -> list[str]:
    return [
        f'<circle cx="{x.at(tokens):.1f}" cy="{y.at(loss):.1f}" r="4" fill="none" '
        f'stroke="{colour}" stroke-width="1.5"/>'
        for tokens, loss in points
    ]


def _frame(x: Axis, y: Axis) -> list[str]:
    count = _tokens_in(x.high)
    parts = [f'<g stroke="{GREY}" stroke-opacity="0.25">']
    parts += [f'<path d="M{x.at(tick):.1f} {TOP}V{HEIGHT - BOTTOM}"/>' for tick in x.ticks()]
    parts += [f'<path d="M{LEFT} {y.at(tick):.1f}H{WIDTH - RIGHT}"/>' for tick in y.ticks()]
    parts.append("</g>")
    parts += [
        f'<text x="{x.at(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
        f"{count(tick)}</text>"
        for tick in x.ticks()
    ]
    parts += [
        f'<text x="{LEFT - 8}" y="{y.at(tick) + 4:.1f}" text-anchor="end">{tick:.10g}</text>'
        for tick in y.ticks()
    ]
    middle = (LEFT + WIDTH - RIGHT) // 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">tokens</text>')
    parts.append(f'<text x="{LEFT}" y="16">nats a token</text>')
    return parts


def _tokens_in(most: float) -> Callable[[float], str]:
    """How to write numbers of tokens up to `most`."""
    size, letter = next(
        ((size, letter) for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if most >= size),
        (1.0, ""),
    )
    return lambda tokens: f"{tokens / size:.10g}{letter}" if tokens else "0"


def _stop(mark: dict[str, Any], x: Axis, line: int | None) -> list[str]:
    """A cross and a dashed line, and what happened in words on a line of its own."""
    place = x.at(float(mark["tokens"] or 0.0))
    parts = [
        f'<path d="M{place:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{GREY}" stroke-dasharray="6 5"/>',
        f'<text x="{place:.1f}" y="{TOP - 4}" text-anchor="middle" font-weight="bold">✕</text>',
    ]
    if line is not None:
        right = place < 0.55 * WIDTH
        parts.append(
            f'<text x="{place + (8 if right else -8):.1f}" y="{TOP + 18 + 18 * line}" '
            f'text-anchor="{"start" if right else "end"}">{escape(str(mark["text"]))}</text>'
        )
    return parts


def _legend(names: Sequence[str]) -> str:
    entries = [
        f'<tspan fill="{COLOURS[number % len(COLOURS)]}">━ {escape(name)}</tspan>'
        for number, name in enumerate(names)
    ]
    text = "   ".join([*entries, "○ held out   ✕ ended and resumed"])
    return f'<text x="{WIDTH - RIGHT}" y="16" text-anchor="end" xml:space="preserve">{text}</text>'
