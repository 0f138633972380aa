"""Trying again: a remote that fails is a pause, not a loss."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from matilda_data.errors import DataError

__all__ = ["BelievedError", "Retry"]

Result = TypeVar("Result")

# A remote in trouble also says "not found"; it must say so this often in a row to be believed.
BELIEVED_AFTER = 3


class BelievedError(DataError):
    """A final error that came so often in a row that it is believed."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Retries with exponential back-off."""

    first_wait: float = 1.0
    """Seconds before the second try; each further wait is twice the one before."""
    longest_wait: float = 60.0
    """Seconds at most between tries."""
    give_up_after: float | None = None
    """Seconds after which the last error is raised; None never gives up."""

    def call(
        self,
        action: Callable[[], Result],
        what: str,
        *,
        final: tuple[type[BaseException], ...] = (),
        note: Callable[[str], None] | None = None,
        stopping: threading.Event | None = None,
    ) -> Result:
        """The result of `action`, tried until it succeeds.

        Args:
            action: may be called any number of times.
            what: named in notes and errors.
            final: errors that end the trying when they come three times in a row.
            note: told before each wait.
            stopping: when set, waiting ends.

        Raises:
            BelievedError: `action` raised final errors, three in a row.
            DataError: it is time to give up or to stop.
        """
        stopping = stopping or threading.Event()
        began, wait, finals = time.monotonic(), self.first_wait, 0
        while True:
            try:
                return action()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                finals = finals + 1 if isinstance(error, final) else 0
                spent = time.monotonic() - began
                late = self.give_up_after is not None and spent + wait > self.give_up_after
                if finals >= BELIEVED_AFTER or late or stopping.is_set():
                    kind = BelievedError if finals >= BELIEVED_AFTER else DataError
                    raise kind(f"{what} failed ({reason})") from error
                if note is not None:
                    note(f"{what}: {reason}; trying again in {wait:g} s")
                stopping.wait(wait)
                wait = min(2 * wait, self.longest_wait)
