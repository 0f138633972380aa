"""Which checkpoints stay: a pure function of what is on disk and the user's rule."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, SupportsIndex

MIN_KEPT = 2
"""Verified healthy checkpoints that no rule can go below."""


@dataclass(frozen=True)
class Keep:
    """Retention rule; a checkpoint stays when any part of it says so.

    Only verified healthy checkpoints count, deletion happens only after a newer checkpoint is
    durable, and two verified healthy ones always stay.
    """

    last: int = 3
    """The newest this many (at least 1; two are kept whatever this says)."""
    every: int | None = None
    """Also every step divisible by this, for good."""
    hours: float | None = None
    """Also the first of every span of this many hours."""
    best: tuple[str, int, str] | None = None
    """Also the best `n` by a metric: (metric, n, "min" or "max")."""

    def __post_init__(self) -> None:
        if not _positive(self.last):
            raise ValueError(f"`last` must be an integer of at least 1, not {self.last!r}")
        if self.every is not None and not _positive(self.every):
            raise ValueError(f"`every` must be a positive number of steps, not {self.every!r}")
        if self.hours is not None and not (
            isinstance(self.hours, int | float) and 1e-6 <= self.hours < math.inf
        ):
            raise ValueError(f"`hours` must be finite and at least 1e-6, not {self.hours!r}")
        if self.best is not None:
            if len(self.best) != 3:
                raise ValueError(f"`best` must be (metric, n, mode), not {self.best!r}")
            _, n, mode = self.best
            if mode not in ("min", "max") or not _positive(n):
                raise ValueError(
                    f"`best` needs n of at least 1 and mode 'min' or 'max', not {self.best!r}"
                )


def check_keep(keep: object) -> None:
    """ValueError for what is no rule: it would be found only when a checkpoint is durable."""
    if not isinstance(keep, Keep):
        raise ValueError(
            f"`keep` must be a `Keep`, not {keep!r}; `Keep(every=1)` keeps every checkpoint"
        )


def _positive(value: object) -> bool:
    return isinstance(value, SupportsIndex) and operator.index(value) >= 1


class Candidate(Protocol):
    """What the rule looks at."""

    @property
    def name(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def created(self) -> str: ...
    @property
    def healthy(self) -> bool: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


def victims(found: Sequence[Candidate], keep: Keep) -> list[str]:
    """Names to delete, oldest first. `found`: intact checkpoints; others never count here."""
    newest_first = sorted(found, key=lambda c: (-c.sequence, -c.step))
    healthy = [c for c in newest_first if c.healthy]
    kept = {c.name for c in healthy[: max(keep.last, MIN_KEPT)]}
    if keep.every is not None:
        kept |= {c.name for c in healthy if c.step % keep.every == 0}
    if keep.hours is not None:
        kept |= _first_of_each_span(healthy, keep.hours)
    if keep.best is not None:
        kept |= _best(healthy, *keep.best)
    doomed = [c for c in healthy if c.name not in kept]
    if len(healthy) >= MIN_KEPT:
        # An unhealthy checkpoint is evidence until two newer healthy ones exist.
        limit = healthy[MIN_KEPT - 1].sequence
        doomed += [c for c in newest_first if not c.healthy and c.sequence < limit]
    return [c.name for c in sorted(doomed, key=lambda c: (c.sequence, c.step))]


def _first_of_each_span(healthy: Sequence[Candidate], hours: float) -> set[str]:
    kept: dict[int, str] = {}
    for candidate in sorted(healthy, key=lambda c: c.sequence):
        try:
            when = datetime.fromisoformat(candidate.created).timestamp()
        except ValueError:
            continue
        kept.setdefault(int(when // (hours * 3600)), candidate.name)
    return set(kept.values())


def _best(healthy: Sequence[Candidate], metric: str, n: int, mode: str) -> set[str]:
    scored = [c for c in healthy if not math.isnan(c.metrics.get(metric, math.nan))]
    scored.sort(key=lambda c: c.metrics[metric], reverse=mode == "max")
    return {c.name for c in scored[:n]}
