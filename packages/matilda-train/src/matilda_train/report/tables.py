"""Rows of cells, heads first, as aligned text or as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["markdown_table", "plain_table"]

Rows = Sequence[Sequence[str]]


def plain_table(rows: Rows, *, left: Collection[int] = (0,)) -> list[str]:
    """A line a row; columns `left` begin at the left, all others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(rows: Rows, *, left: Collection[int] = (0,)) -> list[str]:
    """The same as Markdown."""
    heads, *body = (f"| {' | '.join(row)} |" for row in rows)
    rule = "|".join("---" if i in left else "---:" for i in range(len(rows[0])))
    return [heads, f"|{rule}|", *body]
