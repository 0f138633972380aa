"""What a step number means: tokens before it, its batch and its sequence length.

All of it is a pure function of the step, so a run that ramps its batch or its sequences resumes
from its step alone. Imports no torch: configs are checked with it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from matilda_train.duration import Duration, parse_count

__all__ = ["BatchStage", "StepPlan", "parse_point"]

# torch.compile keeps 8 variants of a model: one a length, one for evaluation, one to spare.
MOST_LENGTHS = 6


@dataclass(frozen=True)
class BatchStage:
    """A stretch of steps of one batch size."""

    first_step: int
    tokens_before: int
    """Tokens of all steps before `first_step`."""
    tokens_per_step: int


class StepPlan:
    """Tokens, batch size and sequence length of every step.

    Ramps are entries `"POINT: VALUE"`: from that point on, that many tokens a step, or tokens a
    sequence. Samples of the data have `seq_len` tokens throughout; a shorter sequence is a part of
    one, so the same tokens come in the same order.

    Raises `ValueError` for points that do not increase, batches that shrink or are no multiple of
    `seq_len`, and sequence lengths that do not divide it.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        seq_len: int,
        batch_ramp: Sequence[str] = (),
        seq_len_ramp: Sequence[str] = (),
    ) -> None:
        self.sample_len = seq_len
        self.batch_stages = [BatchStage(0, 0, tokens_per_step)]
        for entry in batch_ramp:
            point, size = _parse_entry(entry, "train.batch_ramp")
            before = self.batch_stages[-1]
            step = self.step_at(point)
            at_start = step == 0 and len(self.batch_stages) == 1
            if step <= before.first_step and not at_start:
                raise ValueError(
                    f"`train.batch_ramp` has {entry!r} at step {step}, which is not after the "
                    f"change at step {before.first_step}; give points that increase."
                )
            if size % seq_len or not size >= before.tokens_per_step:
                raise ValueError(
                    f"`train.batch_ramp` has {entry!r}, but tokens a step must be a multiple of "
                    f"the sequence length ({seq_len}) and never shrink (from "
                    f"{before.tokens_per_step})."
                )
            if at_start:
                self.batch_stages.pop()
            self.batch_stages.append(BatchStage(step, self._tokens(before, step), size))
        self._firsts = [stage.first_step for stage in self.batch_stages]
        self._lengths = [(0, seq_len)]
        for number, entry in enumerate(seq_len_ramp):
            point, length = _parse_entry(entry, "train.seq_len_ramp")
            step = self.step_at(point)
            if number and step <= self._lengths[-1][0]:
                raise ValueError(
                    f"`train.seq_len_ramp` has {entry!r} at step {step}, which is not after the "
                    f"change at step {self._lengths[-1][0]}; give points that increase."
                )
            if length < 1 or seq_len % length:
                raise ValueError(
                    f"`train.seq_len_ramp` has {entry!r}, but a sequence length must divide "
                    f"`train.seq_len` ({seq_len})."
                )
            self._lengths.append((step, length))
        if len({length for _, length in self._lengths}) > MOST_LENGTHS:
            raise ValueError(
                f"`train.seq_len_ramp` has more than {MOST_LENGTHS} lengths, and torch.compile "
                "keeps no more variants of a model; leave some out."
            )

    def tokens(self, step: int) -> int:
        """Tokens of all steps before `step`: those trained on once `step` steps are done."""
        return self._tokens(self._stage(step), step)

    def samples(self, step: int) -> int:
        """Samples of the data before `step`."""
        return self.tokens(step) // self.sample_len

    def tokens_per_step(self, step: int) -> int:
        """Tokens of the global batch of `step`, counted from 0."""
        return self._stage(step).tokens_per_step

    def batch_size(self, step: int) -> int:
        """Samples of the global batch of `step`."""
        return self.tokens_per_step(step) // self.sample_len

    def seq_len(self, step: int) -> int:
        """Tokens a sequence in `step`."""
        firsts = [first for first, _ in self._lengths]
        return self._lengths[bisect_right(firsts, step) - 1][1]

    def step_at(self, point: Duration) -> int:
        """The first step with that many steps, or at least that many tokens, before it.

        Raises `ValueError` for seconds: they would make the run depend on the machine's speed.
        """
        if point.unit == "seconds":
            raise ValueError(
                f"{str(point)!r} depends on the speed of the machine; give a point in steps or "
                "tokens."
            )
        if point.unit == "steps":
            return int(point.amount)
        stage = next(s for s in reversed(self.batch_stages) if s.tokens_before <= point.amount)
        return stage.first_step + -(
            -(int(point.amount) - stage.tokens_before) // stage.tokens_per_step
        )

    def _stage(self, step: int) -> BatchStage:
        return self.batch_stages[bisect_right(self._firsts, step) - 1]

    @staticmethod
    def _tokens(stage: BatchStage, step: int) -> int:
        return stage.tokens_before + (step - stage.first_step) * stage.tokens_per_step


def parse_point(text: str, field: str) -> Duration:
    """A point of a run in steps or tokens; `ValueError` naming `field`."""
    try:
        point = Duration.parse(text.strip())
    except ValueError as error:
        raise ValueError(f"`{field}`: {error}") from None
    if point.unit == "seconds":
        raise ValueError(
            f"`{field}` has {text.strip()!r}, which depends on the speed of the machine; give a "
            "point in steps or tokens."
        )
    return point


def _parse_entry(entry: str, field: str) -> tuple[Duration, int]:
    point, colon, value = entry.partition(":")
    if not colon:
        raise ValueError(
            f'`{field}` has {entry!r}; give "POINT: VALUE", as in "500 steps: 1024" or '
            '"1B tokens: 1048576".'
        )
    try:
        return parse_point(point, field), parse_count(value.strip())
    except ValueError as error:
        message = str(error)
        raise ValueError(message if field in message else f"`{field}`: {message}") from None
