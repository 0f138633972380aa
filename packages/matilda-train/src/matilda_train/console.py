"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Display", "SilentDisplay", "TerminalDisplay"]


class Display(Protocol):
    """Where the loop and data preparation report to."""

    def begin(self, what: str, *, total: int, done: int = 0) -> None:
        """A phase of `total` units begins, `done` of them already behind it."""

    def advance(self, done: int, detail: str) -> None:
        """`done` units are behind it now."""

    def note(self, text: str) -> None:
        """One line that stays."""


class SilentDisplay:
    """Shows nothing: for tests, and for ranks other than the first."""

    def begin(self, what: str, *, total: int, done: int = 0) -> None:
        pass

    def advance(self, done: int, detail: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class TerminalDisplay:
    """A progress bar with ETA on a terminal; elsewhere, and without rich, a line every `interval`
    seconds.

    What can no longer be written (the disk under a log is full, `tee` has ended) is passed over: a
    run does not end for want of a reader.
    """

    def __init__(self, *, interval: float = 10.0) -> None:
        self._interval = interval
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._what, self._total, self._first = "", 0, 0
        self._first_at: float | None = None
        self._spoke, self._whole = -math.inf, False

    def __enter__(self) -> TerminalDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def begin(self, what: str, *, total: int, done: int = 0) -> None:
        self._end()
        self._what, self._total, self._first_at = what, total, None
        self._spoke, self._whole = -math.inf, False
        self._progress = _live_bar()
        if self._progress is not None:
            with suppress(OSError):
                self._progress.start()
            self._task = self._progress.add_task(what, total=total, completed=done, detail="")

    def advance(self, done: int, detail: str) -> None:
        now = time.monotonic()
        if self._first_at is None:  # what came before, such as compiling, says nothing of the rate
            self._first, self._first_at = done, now
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, detail=detail)
            if now - self._spoke > 0.1 or done >= self._total:
                self._spoke = now
                with suppress(OSError):
                    self._progress.refresh()
        elif not self._whole and (now - self._spoke >= self._interval or done >= self._total):
            self._spoke, self._whole = now, done >= self._total
            rate = (done - self._first) / max(now - self._first_at, 1e-9)
            left = max(self._total - done, 0)
            eta = f"ETA {_clock(left / rate if left else 0)}" if rate > 0 or not left else "ETA –"
            percent = 100 * done / max(self._total, 1)
            self.note(f"{self._what} {percent:3.0f} %  {detail}  {eta}")

    def note(self, text: str) -> None:
        with suppress(OSError):
            if self._progress is not None:
                self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)

    def _end(self) -> None:
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()
            self._progress = None


def _live_bar() -> Progress | None:
    """A bar for standard error; None where it is no terminal that redraws, or rich is missing."""
    if not sys.stderr.isatty() or os.environ.get("TERM") in (None, "", "dumb"):
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[detail]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        console=Console(file=sys.stderr),
        transient=True,
        # Redrawing from a thread would touch the terminal in the middle of a signal.
        auto_refresh=False,
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
