"""What a run is doing right now, and how long it has done each thing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["PHASES", "PhaseClock"]

PHASES = (
    "preparing data",
    "starting",
    "restoring",
    "warming up",
    "training",
    "examining",
    "evaluating",
    "saving",
    "sampling",
)
"""Every phase of a run; "warming up" is the first step of a process: it compiles, and allocates;
"examining" is an autopsy."""


class PhaseClock:
    """Knows the current phase; `on_phase(name)` is called at the beginning of each.

    Every second since the clock was made belongs to one phase; `time_account` adds them up.
    """

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        self._on_phase = on_phase
        self._seconds: dict[str, float] = {}
        self.since = self._made = time.monotonic()
        """When the current phase began, of `time.monotonic`."""
        self.current = "starting"
        self.warm = False
        """Whether this process has a whole training step behind it."""
        self._steps = 0
        self.enter("starting")

    def enter(self, phase: str) -> None:
        """End the current phase and begin `phase`."""
        assert phase in PHASES
        now = time.monotonic()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self.since
        self.since = now
        self.current = phase
        if self._on_phase is not None:
            self._on_phase(phase)

    def enter_step(self) -> None:
        """Begin a training step."""
        self.warm = self._steps > 0
        self._steps += 1
        self.enter("training" if self.warm else "warming up")

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Be in `phase` for a block, then, also after an error, in the phase before it again."""
        before = self.current
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def uptime(self) -> float:
        """Seconds since the clock was made."""
        return time.monotonic() - self._made

    def current_seconds(self) -> float:
        """Seconds since the current phase was entered."""
        return time.monotonic() - self.since

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each phase so far, the current one included."""
        now = time.monotonic() - self.since
        spent = self._seconds | {self.current: self._seconds.get(self.current, 0.0) + now}
        return {phase: round(spent[phase], 3) for phase in PHASES if phase in spent}
