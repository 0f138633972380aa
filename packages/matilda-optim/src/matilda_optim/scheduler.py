"""Schedules applied to an optimizer: per group and per key, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

Schedule = Callable[[int], float]
"""0-based step → value; for example `functools.partial(wsd, total_steps=…, …)`."""


class GroupScheduler(LRScheduler):
    """Sets `lr`, and where asked `weight_decay` and `momentum`, of every group from its step.

    Args:
        optimizer: any torch optimizer; groups may carry `name` and `algorithm`.
        lr: multiplier of the group's initial lr: one schedule, or a mapping from a group's `name`
            or `algorithm` (or "default") to its schedule.
        weight_decay: multiplier of the initial weight decay, which the group keeps as
            `initial_weight_decay`, in the same forms.
        momentum: the momentum itself, for the groups that have one, in the same forms.

    Call `step()` after the optimizer's, as with any torch scheduler. A group that is added to the
    optimizer later joins at the next step, from the values that it came with. The state is the
    step and the initial values, so a resume anywhere is exact and the schedules may be edited in
    between.

    Raises:
        ValueError: a mapping without an entry for one of the groups.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr: Schedule | Mapping[str, Schedule],
        *,
        weight_decay: Schedule | Mapping[str, Schedule] | None = None,
        momentum: Schedule | Mapping[str, Schedule] | None = None,
    ) -> None:
        self._asked = (lr, weight_decay, momentum)
        self._lr: list[Schedule] = []
        self._decay: list[Schedule | None] = []
        self._momentum: list[Schedule | None] = []
        self._base_decay: list[float] = []
        for group in optimizer.param_groups:
            self._join(group)
        super().__init__(optimizer)

    def _join(self, group: dict[str, Any]) -> None:
        """Picks the schedules of the next group."""
        lr, weight_decay, momentum = self._asked
        picked = _pick(lr, group)
        picked_decay = _pick(weight_decay, group) if weight_decay else None
        picked_momentum = _pick(momentum, group) if momentum else None
        self._lr.append(picked)
        self._decay.append(picked_decay)
        self._momentum.append(picked_momentum)
        decay = group.get("weight_decay", 0.0)
        if weight_decay:  # kept as torch keeps `initial_lr`: another scheduler may come
            decay = group.setdefault("initial_weight_decay", decay)
        self._base_decay.append(group.get("initial_weight_decay", decay))

    def _join_late(self) -> None:
        """The groups that the optimizer has been given since."""
        for group in self.optimizer.param_groups[len(self._lr) :]:
            self._join(group)
            lr = group["lr"]
            lr = group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
            self.base_lrs.append(lr.clone() if isinstance(lr, Tensor) else lr)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of every group at the current step."""
        self._join_late()
        self._set_others()
        return [
            float(base * schedule(self.last_epoch))
            for base, schedule in zip(self.base_lrs, self._lr, strict=True)
        ]

    def _set_others(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            decay, momentum = self._decay[i], self._momentum[i]
            if decay is not None:
                group["weight_decay"] = self._base_decay[i] * decay(self.last_epoch)
            if momentum is not None and "momentum" in group:
                group["momentum"] = momentum(self.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """The step and the initial values; schedules are code and are not saved."""
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": list(self.base_lrs),
            "base_decay": list(self._base_decay),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the saved step and sets every group accordingly.

        Raises:
            ValueError: the state of another number of groups.
        """
        groups = self.optimizer.param_groups
        self._join_late()
        if len(state_dict["base_lrs"]) != len(groups):
            raise ValueError(
                f"the scheduler's state is of {len(state_dict['base_lrs'])} groups, the optimizer "
                f"has {len(groups)}; build the groups as they were saved"
            )
        self.last_epoch = state_dict["last_epoch"]
        self.base_lrs = list(state_dict["base_lrs"])
        self._base_decay = list(state_dict["base_decay"])
        for group, lr in zip(groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # a captured graph reads this tensor
            else:
                group["lr"] = lr
        self._last_lr = [group["lr"] for group in groups]


def _pick(schedules: Schedule | Mapping[str, Schedule], group: Mapping[str, Any]) -> Schedule:
    if callable(schedules):
        return schedules
    for key in (str(group.get("name")), str(group.get("algorithm")), "default"):
        if key in schedules:
            return schedules[key]
    raise ValueError(
        f"no schedule for the group {group.get('name')!r} of algorithm {group.get('algorithm')!r}; "
        'add one of these keys or "default"'
    )


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """Batch size by tokens seen: a pure function, so a resume is exact."""

    batch: int
    """Sequences (or tokens) per step from the start."""
    stages: tuple[tuple[int, int], ...]
    """(tokens seen, batch from there on), both increasing."""
    exponent: float = 0.5
    """The learning rate grows with (batch / first batch) to this power."""

    def __post_init__(self) -> None:
        tokens = [stage[0] for stage in self.stages]
        sizes = [self.batch, *(stage[1] for stage in self.stages)]
        if self.batch < 1 or tokens != sorted(set(tokens)) or any(t < 0 for t in tokens):
            raise ValueError(f"`stages` need increasing token counts, got {self.stages!r}")
        if sizes != sorted(sizes):
            raise ValueError(f"`stages` need growing batches from {self.batch!r}: {self.stages!r}")

    def at(self, tokens: int) -> tuple[int, float]:
        """(batch, learning-rate multiplier) after `tokens` tokens."""
        batch = self.batch
        for threshold, size in self.stages:
            if tokens >= threshold:
                batch = size
        return batch, (batch / self.batch) ** self.exponent
