"""The `ckpt` section."""

from __future__ import annotations

from dataclasses import dataclass

from matilda_train.config.checks import interval_of, require
from matilda_train.duration import Duration

__all__ = ["CkptConfig"]


@dataclass(frozen=True, kw_only=True)
class CkptConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int = 1000
    """Steps between checkpoints, besides one at the end and one when the run is stopped."""

    every: int | str | None = None
    """The same as a duration, such as `"10M tokens"` or `"15 min"`; null means `every_steps`."""

    background: bool = True
    """Write checkpoints beside training: it stops only while the state is copied."""

    keep_last: int = 3
    """Newest checkpoints to keep, never fewer than two."""

    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this; null for none. Where `every` is
    in tokens or seconds, one is also written at each of these steps."""

    def __post_init__(self) -> None:
        _ = self.interval
        require(self.keep_last >= 2, "ckpt.keep_last", self.keep_last, "2 or more")
        every = self.keep_every
        require(every is None or every >= 1, "ckpt.keep_every", every, "1 or more")

    @property
    def interval(self) -> Duration:
        """Time between checkpoints."""
        return interval_of(self.every, self.every_steps, "ckpt")

    @property
    def also_steps(self) -> int | None:
        """Checkpoints are also written at multiples of this many steps; None: at no others."""
        return None if self.interval.unit == "steps" else self.keep_every
