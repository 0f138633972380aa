"""The `optim` section: optimizer, and the schedules of its rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from matilda_train.config.checks import require

__all__ = ["OptimConfig"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    algorithm: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon for hidden matrices, AdamW for the rest. `adamw`: AdamW for everything."""

    lr: float = 0.004
    """Peak learning rate of the hidden matrices. Muon's updates have an RMS of 0.2 times it, as
    AdamW's have about: 0.02 where updates are orthogonal matrices is 0.0036 here for 768 × 768."""

    adamw_lr: float | None = None
    """Peak learning rate of embeddings, an untied head, norms and scalars when `algorithm` is
    `muon`; null means `lr`, which `adamw` takes for all of them."""

    embedding_lr: float | None = None
    """Peak learning rate of the embedding, tied or not, whatever the algorithm; null means that of
    AdamW's other parameters."""

    weight_decay: float = 0.0
    """Decoupled weight decay of the hidden matrices; parameters of one dimension never decay."""

    adamw_weight_decay: float = 0.0
    """Decoupled weight decay of AdamW's matrices (the embedding) when `algorithm` is `muon`."""

    momentum: float = 0.95
    """Muon's momentum."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    eps: float = 1e-8
    """AdamW's denominator term."""

    backend: Literal["reference", "auto", "triton"] = "auto"
    """Kernels of Muon's step: `auto` takes Triton kernels where the GPU has them (4 ms of the 152M
    model's step on an H100), `reference` plain torch (11 ms)."""

    distribute: Literal["none", "ddp", "auto"] = "auto"
    """With several ranks and `train.parallel` `ddp`: `ddp` has each rank orthogonalise its share of
    the matrices, `none` all of them, `auto` what is faster for each shape, measured once. The
    weights are the same bits."""

    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Shape of the learning rate: warm-up + stable + decay, warm-up + cosine, or warm-up only."""

    warmup_steps: int = 0
    """Steps of linear warm-up, part of the run's `train.total_steps`."""

    decay_fraction: float = 0.2
    """Fraction of the run that WSD spends in its final decay."""

    decay_shape: Literal["linear", "1-sqrt", "cosine", "exponential", "power"] = "linear"
    """How the learning rate falls in WSD's decay; see `matilda_optim.wsd`."""

    final_lr_fraction: float = 0.0
    """Learning rate at the end of the run, as a fraction of its peak."""

    schedule_by: Literal["steps", "tokens"] = "steps"
    """What the learning rate's schedule counts: the same, unless `train.batch_ramp` is set."""

    batch_lr_exponent: float = 0.5
    """Where `train.batch_ramp` has made the batch n times the first, the learning rate is n to this
    power times what it would be; 0 leaves it alone."""

    weight_decay_schedule: Literal["constant", "lr", "linear", "cosine"] = "constant"
    """How weight decay, itself a factor on the learning rate, changes: not at all, in step with the
    learning rate, or over the whole run on a straight line or half a cosine."""

    final_weight_decay_fraction: float = 0.0
    """Where `linear` and `cosine` end, as a fraction of the weight decay at the start."""

    momentum_warmup_steps: int = 0
    """Steps in which Muon's momentum rises from `momentum_start` to `momentum`; 0 for none."""

    momentum_cooldown_steps: int = 0
    """Last steps of the run, in which Muon's momentum returns to `momentum_start`; 0 for none."""

    momentum_start: float = 0.85
    """Muon's momentum before its warm-up and after its cool-down."""

    def __post_init__(self) -> None:
        for name in ("lr", "adamw_lr", "embedding_lr", "eps"):
            value = getattr(self, name)
            require(value is None or value > 0, f"optim.{name}", value, "positive")
        for name in (
            *("weight_decay", "adamw_weight_decay"),
            *("warmup_steps", "momentum_warmup_steps", "momentum_cooldown_steps"),
        ):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "0 or more")
        for name in ("decay_fraction", "final_lr_fraction", "final_weight_decay_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name}", value, "in [0, 1]")
        exponent = self.batch_lr_exponent
        require(0 <= exponent <= 10, "optim.batch_lr_exponent", exponent, "in [0, 10]")
        for name in ("momentum", "momentum_start"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}", value, "in [0, 1)")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "in [0, 1)")

    @property
    def momentum_is_scheduled(self) -> bool:
        """Whether Muon's momentum is anything but constant."""
        return self.momentum_warmup_steps > 0 or self.momentum_cooldown_steps > 0
