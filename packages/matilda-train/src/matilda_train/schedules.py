"""Learning rate, weight decay and momentum of every step, as pure functions of the step."""

from __future__ import annotations

from matilda_optim import (
    BatchRamp,
    Muon,
    constant,
    cosine,
    linear_to_zero,
    momentum_warmup,
    wsd,
)
from matilda_train.config import RunConfig

__all__ = ["Schedules"]


class Schedules:
    """Sets an optimizer's hyper-parameters for a step; nothing of it needs saving.

    Make it before a checkpoint is restored: the weight decay that it scales is the config's.
    """

    def __init__(self, config: RunConfig, optimizer: Muon) -> None:
        self._config = config
        self._plan = config.plan
        self._optimizer = optimizer
        self._weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        first, *rest = self._plan.batch_stages
        self._ramp = BatchRamp(
            batch=first.tokens_per_step,
            stages=tuple((stage.tokens_before, stage.tokens_per_step) for stage in rest),
            exponent=config.optim.batch_lr_exponent,
        )

    def apply(self, step: int) -> float:
        """Set every group for the 0-based `step`; returns the factor on peak learning rates."""
        optim = self._config.optim
        factor = self.lr_factor(step)
        for group, weight_decay in zip(
            self._optimizer.param_groups, self._weight_decays, strict=True
        ):
            group["lr"] = group["initial_lr"] * factor
            if optim.weight_decay_schedule != "constant":
                group["weight_decay"] = weight_decay * self.weight_decay_factor(step)
            if optim.momentum_is_scheduled and group["algorithm"] == "muon":
                group["momentum"] = self.momentum(step)
        return factor

    def learning_rates(self) -> dict[str, float]:
        """`lr_muon` and `lr_adamw` as last set, of the algorithms there are; and `lr_embedding`
        where the embedding has a rate of its own."""
        own = self._config.optim.embedding_lr is not None
        rates = {}
        for group in self._optimizer.param_groups:
            alone = own and group["name"] == "embedding"
            rates["lr_embedding" if alone else f"lr_{group['algorithm']}"] = float(group["lr"])
        return rates

    def lr_factor(self, step: int) -> float:
        """Factor on every peak learning rate: the schedule's, times the batch ramp's."""
        factor = self._lr_schedule(step)
        if len(self._plan.batch_stages) > 1:
            factor *= self._ramp.at(self._plan.tokens(step))[1]
        return factor

    def weight_decay_factor(self, step: int) -> float:
        """Factor on every group's weight decay."""
        optim, total = self._config.optim, self._config.train.total_steps
        if optim.weight_decay_schedule == "lr":
            return self._lr_schedule(step)
        if optim.weight_decay_schedule == "linear":
            return linear_to_zero(step, total_steps=total, final=optim.final_weight_decay_fraction)
        if optim.weight_decay_schedule == "cosine":
            return cosine(step, total_steps=total, final=optim.final_weight_decay_fraction)
        return 1.0

    def momentum(self, step: int) -> float:
        """Muon's momentum."""
        optim = self._config.optim
        if not optim.momentum_is_scheduled:
            return optim.momentum
        return momentum_warmup(
            step,
            warmup_steps=optim.momentum_warmup_steps,
            start=optim.momentum_start,
            peak=optim.momentum,
            total_steps=self._config.train.total_steps,
            cooldown_steps=optim.momentum_cooldown_steps,
        )

    def _lr_schedule(self, step: int) -> float:
        optim, total = self._config.optim, self._config.train.total_steps
        warmup, decay = optim.warmup_steps, round(optim.decay_fraction * total)
        if optim.schedule_by == "tokens":
            # Warm-up counts the tokens that the step ends with, as it counts the step itself.
            tokens = self._plan.tokens
            warming = step < warmup
            step = tokens(step + 1) - 1 if warming else tokens(step)
            warmup, total = tokens(warmup), tokens(total)
            decay = min(round(optim.decay_fraction * total), total - warmup)
        if optim.schedule == "wsd":
            return wsd(
                step,
                total_steps=total,
                warmup_steps=warmup,
                decay_steps=decay,
                shape=optim.decay_shape,
                final=optim.final_lr_fraction,
            )
        if optim.schedule == "cosine":
            return cosine(
                step, total_steps=total, warmup_steps=warmup, final=optim.final_lr_fraction
            )
        return constant(step, warmup_steps=warmup)
