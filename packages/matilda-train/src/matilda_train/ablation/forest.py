"""Differences with their intervals as a self-contained SVG."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from matilda_train.ablation.results import RowResult, StudyResult

__all__ = ["draw_forest"]

LEFT, WIDTH, RIGHT, LINE, TOP = 150, 420, 90, 22, 46
COLOURS = {"better": "#3a7d44", "worse": "#d1495b"}


def draw_forest(result: StudyResult) -> str:
    """A dot and a bar a row, the baseline at zero, single seeds as small rings."""
    rows = [row for row in result.rows if row.comparison is not None]
    low, high = _range(rows)

    def x(value: float) -> float:
        return LEFT + WIDTH * (min(max(value, low), high) - low) / (high - low)

    height = TOP + LINE * max(len(rows), 1) + 34
    bottom = TOP + LINE * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" '
        f'height="{height}" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{LEFT + WIDTH + RIGHT}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-weight="bold">Held-out loss, row minus baseline, nats'
        "</text>",
        f'<text x="{LEFT}" y="34" fill="#555">left of the line is better; bars: 95 % intervals; '
        "rings: seeds</text>",
        f'<path d="M{x(0):.1f} {TOP - 4}V{bottom}" stroke="#888"/>',
    ]
    for number, row in enumerate(rows):
        parts += _draw_row(row, TOP + LINE * number + LINE / 2, x, low, high)
    for value, anchor in ((low, "start"), (0.0, "middle"), (high, "end")):
        parts.append(
            f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="{anchor}" fill="#555">'
            f"{value:+.3f}</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


def _draw_row(
    row: RowResult, y: float, x: Callable[[float], float], low: float, high: float
) -> list[str]:
    found = row.comparison
    assert found is not None
    colour = COLOURS.get(found.verdict, "#555555")
    parts = [f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(row.name)}</text>']
    if found.half_width is not None:
        begin, end = x(found.difference - found.half_width), x(found.difference + found.half_width)
        parts.append(
            f'<path d="M{begin:.1f} {y}H{end:.1f}" stroke="{colour}" stroke-width="3" '
            'opacity="0.5"/>'
        )
    parts += [
        f'<circle cx="{x(value):.1f}" cy="{y}" r="2.5" fill="none" stroke="{colour}"/>'
        for value in found.per_seed.values()
    ]
    parts.append(f'<circle cx="{x(found.difference):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    beyond = "→" if found.difference > high else "←" if found.difference < low else ""
    parts.append(
        f'<text x="{LEFT + WIDTH + 8}" y="{y + 4}" fill="{colour}">{found.difference:+.4f}'
        f"{beyond}</text>"
    )
    return parts


def _range(rows: list[RowResult]) -> tuple[float, float]:
    """Wide enough for three rows in four; what lies beyond gets an arrow."""
    reach = sorted(
        abs(row.comparison.difference) + (row.comparison.half_width or 0.0)
        for row in rows
        if row.comparison is not None
    )
    widest = 1.1 * reach[(3 * (len(reach) - 1)) // 4] if reach else 0.0
    return (-widest, widest) if widest > 0 else (-0.01, 0.01)
