"""One line on a terminal about a preparation under way."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TextIO

from matilda_data.progress import Progress

__all__ = ["CountLine", "ProgressLine"]

SECONDS_BETWEEN = 0.2


class ProgressLine:
    """A progress callback that keeps one line up to date: share, tokens/s, ETA, sources.

    On a terminal the line is rewritten; elsewhere a line is printed every `interval` seconds. What
    can no longer be written (the terminal is gone) is passed over.

    Args:
        stream: where to write; None for standard error.
        interval: seconds between lines that are not rewritten.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 30.0) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = SECONDS_BETWEEN if self._terminal else interval
        self._began: tuple[float, int] | None = None
        self._written = 0.0
        self._stage = ""

    def __call__(self, row: Progress) -> None:
        """Show `row`, unless the last one is too recent."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, row.tokens)  # resumed work is not this run's speed
        due = now - self._written >= self._interval or row.stage != self._stage or row.note
        if not due:
            return
        self._written, self._stage = now, row.stage
        text = describe(row, now - self._began[0], row.tokens - self._began[1])
        if self._terminal:
            text = f"\r\x1b[K{text}" + ("\n" if row.stage == "done" else "")
        else:
            text += "\n"
        with suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


class CountLine:
    """`verified 3 of 75`, on one line of standard error, for work of over two seconds.

    The line is rewritten on a terminal, and gone at the end; elsewhere it is one every 30 seconds.
    """

    def __init__(self, what: str, stream: TextIO | None = None) -> None:
        self._what = what
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._next = time.monotonic() + (2.0 if self._terminal else 30.0)
        self._shown = False

    def __enter__(self) -> CountLine:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown and self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def __call__(self, done: int, total: int) -> None:
        """Say how many are done, unless it was said just now."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (SECONDS_BETWEEN if self._terminal else 30.0)
        self._shown = True
        text = f"{self._what} {done:,} of {total:,}"
        self._stream.write(f"\r\x1b[K{text}" if self._terminal else text + "\n")
        self._stream.flush()


def describe(row: Progress, seconds: float, new_tokens: int) -> str:
    """The line for `row`, `seconds` and `new_tokens` after the first one."""
    rate = new_tokens / seconds if seconds > 0 else 0.0
    fraction = None
    if row.stage == "pack":
        rate = 0.0  # both are of the encoding
    elif row.target_tokens:
        fraction = min(row.tokens / row.target_tokens, 1.0)
    elif row.bytes_total:
        fraction = min(row.bytes_done / row.bytes_total, 1.0)
    fields = [row.stage]
    if fraction is not None:
        fields.append(f"{100 * fraction:.1f} %")
    fields.append(f"{_number(row.tokens)} tokens")
    fields.append(f"{row.documents:,} documents")
    if rate > 0 and row.stage != "done":
        fields.append(f"{_number(round(rate))} tokens/s")
        if fraction and row.stage == "encode":
            left = row.tokens / fraction - row.tokens
            fields.append(f"ETA {_duration(left / rate)}")
    if len(row.source_tokens) > 1:
        shares = (f"{name} {_number(count)}" for name, count in row.source_tokens.items())
        fields.append("(" + ", ".join(shares) + ")")
    if row.note:
        fields.append(row.note)
    return " · ".join(fields)


def _number(count: int) -> str:
    return f"{count / 1e6:,.2f}M" if count >= 1_000_000 else f"{count:,}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
