"""The `log` section."""

from __future__ import annotations

from dataclasses import dataclass

from matilda_train.config.checks import interval_of, require
from matilda_train.duration import Duration

__all__ = ["LogConfig"]


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down while training."""

    every_steps: int = 10
    """Steps between rows of `metrics.jsonl`. Loss, gradient norm and rates are of the row's own
    step; times and speeds are means over the steps since the row before."""

    every: int | str | None = None
    """The same as a duration, such as `"1M tokens"` or `"10 s"`; null means `every_steps`."""

    rms_every_steps: int = 50
    """A row of a step that is a multiple of this also holds the RMS of every optimizer group's
    parameters and of their change; such a step is about a millisecond longer for 152M parameters on
    an H100."""

    autopsies: int = 5
    """Bundles to write on bad steps (not finite, or a spike), the run's first; 0 for none."""

    wandb: bool = False
    """Also log to Weights & Biases (needs `matilda-train[wandb]`), by a process beside the run's;
    what cannot be sent is kept in the run directory for `wandb sync`."""

    wandb_project: str = "matilda"
    """Project name at Weights & Biases."""

    def __post_init__(self) -> None:
        _ = self.interval
        every = self.rms_every_steps
        require(every >= 1, "log.rms_every_steps", every, "1 or more")
        require(self.autopsies >= 0, "log.autopsies", self.autopsies, "0 or more")

    @property
    def interval(self) -> Duration:
        """Time between rows."""
        return interval_of(self.every, self.every_steps, "log")
