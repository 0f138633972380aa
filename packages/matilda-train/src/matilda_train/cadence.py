"""Whether something is due now: every so many steps, tokens or seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from matilda_train.duration import Duration
from matilda_train.step_plan import StepPlan

__all__ = ["Cadence"]


class Cadence:
    """Asked once a step. In steps and tokens the answer is a function of the step alone.

    Seconds are those of this process's monotonic clock, which no change of the date moves, since
    the last time it was due. `agree` makes one answer of all ranks' for them. With `also_steps`, it
    is due at every multiple of that many steps as well.
    """

    def __init__(
        self,
        every: Duration,
        plan: StepPlan,
        agree: Callable[[bool], bool] = lambda due: due,
        *,
        also_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every = every
        self._plan = plan
        self._agree = agree
        self._also_steps = also_steps
        self._clock = clock
        self._last = clock()

    def due(self, step: int) -> bool:
        """Whether it is due after `step` steps; always at 0."""
        also = self._also_steps is not None and step % self._also_steps == 0
        return self._is_due(step) or also

    def _is_due(self, step: int) -> bool:
        amount = self._every.amount
        if self._every.unit == "steps":
            return step % amount == 0
        if self._every.unit == "tokens":
            tokens = self._plan.tokens
            return step == 0 or tokens(step) // amount > tokens(step - 1) // amount
        now = self._clock()
        if step > 0 and not self._agree(now - self._last >= amount):
            return False
        self._last = now
        return True
