"""What a person sees of a study: a live table of rows × seeds on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from matilda_train.ablation.runner import Progress

__all__ = ["StudyTerminal"]


class StudyTerminal:
    """Redraws a table where the terminal can; elsewhere, and without rich, a line now and then."""

    def __init__(self, *, interval: float = 30.0) -> None:
        self._interval = interval
        self._live: Any = _live_table()
        self._drawn = time.monotonic() - interval

    def __enter__(self) -> StudyTerminal:
        if self._live is not None:
            with suppress(OSError):  # as in `TerminalDisplay`: nobody may be reading any more
                self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._live is not None:
            if now - self._drawn > 0.2 or not progress.running:
                self._drawn = now
                with suppress(OSError):
                    self._live.update(_table(progress), refresh=True)
        elif now - self._drawn > self._interval:
            self._drawn = now
            self.note(_summary(progress))

    def note(self, text: str) -> None:
        with suppress(OSError):
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)


def _cell(progress: Progress, row: str, seed: int) -> str:
    key = (row, seed)
    if key in progress.running:
        return f"{100 * progress.running[key]:.0f} %"
    return progress.done.get(key, "·")


def _summary(progress: Progress) -> str:
    done, total = len(progress.done), len(progress.rows) * progress.seeds
    running = ", ".join(
        f"{row} seed {seed} {100 * share:.0f} %" for (row, seed), share in progress.running.items()
    )
    return f"{done} of {total} runs ended{f'; {running}' if running else ''}{_eta(progress)}"


def _eta(progress: Progress) -> str:
    seconds = progress.eta_seconds()
    if seconds is None or len(progress.done) == len(progress.rows) * progress.seeds:
        return ""
    return f"; about {seconds / 60:.1f} min left"


def _table(progress: Progress) -> Any:
    from rich.table import Table

    table = Table("row", title=_summary(progress), title_justify="left", box=None)
    for seed in range(progress.seeds):
        table.add_column(f"seed {seed}", justify="right")
    for row in progress.rows:
        table.add_row(row, *(_cell(progress, row, seed) for seed in range(progress.seeds)))
    return table


def _live_table() -> Any:
    """rich's live region on standard error, or None."""
    if not sys.stderr.isatty() or os.environ.get("TERM") in (None, "", "dumb"):
        return None
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        return None
    # Redrawing from a thread would touch the terminal in the middle of a signal.
    return Live(console=Console(file=sys.stderr), auto_refresh=False)
