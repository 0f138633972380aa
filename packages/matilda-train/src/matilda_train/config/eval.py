"""The `eval` section."""

from __future__ import annotations

from dataclasses import dataclass

from matilda_train.config.checks import interval, interval_of, require
from matilda_train.duration import Duration

__all__ = ["EvalConfig"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the held-out part of the data set."""

    every_steps: int = 250
    """Steps between evaluations, besides one before the first step and one at the end."""

    every: int | str | None = None
    """The same as a duration, such as `"10M tokens"` or `"15 min"`; null means `every_steps`."""

    tokens: int = 1_048_576
    """Held-out tokens per evaluation, at most as many as there are."""

    tasks: tuple[str, ...] = ()
    """Question sets to score as well, such as `["hellaswag", "piqa"]`: files of `task_dir`."""

    task_dir: str | None = None
    """Folder of task files (`matilda_train.evals.task_files`); needed for `tasks`."""

    tasks_every: int | str | None = None
    """Steps between scorings of `tasks`, or a duration such as `"500M tokens"`; each is part of an
    evaluation, and so is one at the end. Null: at every evaluation."""

    task_limit: int | None = None
    """Score the first so many items of each task; null for all."""

    sample_prompt: str = ""
    """Prompt of the sample that closes the run; empty: the sample begins a new document."""

    sample_tokens: int = 200
    """Length of that sample in tokens; 0 for none."""

    def __post_init__(self) -> None:
        _ = self.interval
        _ = self.tasks_interval
        for name in ("tokens", "task_limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"eval.{name}", value, "1 or more")
        require(
            not self.tasks or self.task_dir is not None,
            "eval.task_dir",
            self.task_dir,
            "the folder of the task files that `eval.tasks` names",
        )
        require(
            len(set(self.tasks)) == len(self.tasks), "eval.tasks", self.tasks, "without repetition"
        )
        require(self.sample_tokens >= 0, "eval.sample_tokens", self.sample_tokens, "0 or more")

    @property
    def interval(self) -> Duration:
        """Time between evaluations."""
        return interval_of(self.every, self.every_steps, "eval")

    @property
    def tasks_interval(self) -> Duration | None:
        """Time between scorings of `tasks`; None: every evaluation has one."""
        every = self.tasks_every
        return None if every is None else interval(every, "eval.tasks_every")
