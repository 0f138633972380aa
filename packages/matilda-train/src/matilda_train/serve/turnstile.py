"""One at a time, in the order of arrival."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["BusyError", "Turnstile"]


class BusyError(Exception):
    """So many wait already that another is sent away."""


class Turnstile:
    """Lets one thread through at a time; the others queue, at most `most_waiting` of them."""

    def __init__(self, most_waiting: int = 16) -> None:
        self._most_waiting = most_waiting
        self._queue: deque[object] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, still_waiting: Callable[[int], bool]) -> Iterator[bool]:
        """Wait for a turn; yields whether it came.

        `still_waiting(ahead)` is asked when the queue moves and every half second; False gives the
        place up, as when the client has gone. Raises `BusyError` when the queue is full.
        """
        ticket = object()
        with self._moved:
            if len(self._queue) > self._most_waiting:
                raise BusyError
            self._queue.append(ticket)
        try:
            yield self._wait(ticket, still_waiting)
        finally:
            with self._moved:
                self._queue.remove(ticket)
                self._moved.notify_all()

    def _wait(self, ticket: object, still_waiting: Callable[[int], bool]) -> bool:
        while True:
            with self._moved:
                ahead = self._queue.index(ticket)
            if ahead == 0:
                return True
            if not still_waiting(ahead):
                return False
            with self._moved:
                if self._queue.index(ticket) == ahead:
                    self._moved.wait(0.5)
