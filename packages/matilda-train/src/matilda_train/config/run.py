"""A whole run: all sections, and what must hold between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from matilda_model import ModelConfig
from matilda_train.config.checks import require
from matilda_train.config.ckpt import CkptConfig
from matilda_train.config.data import DataConfig
from matilda_train.config.eval import EvalConfig
from matilda_train.config.log import LogConfig
from matilda_train.config.optim import OptimConfig
from matilda_train.config.train import TrainConfig
from matilda_train.step_plan import StepPlan

__all__ = ["RunConfig"]

MOST_LAYERS = 10_000
MOST_PARAMETERS = 10**16
"""Their bytes still fit 64 bits; whether memory holds them is found out elsewhere."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `plan`, `seq_len` and `grad_accum_steps` are derived, never stated."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    ckpt: CkptConfig = field(default_factory=CkptConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        vocab_size = self.model.vocab_size
        require(vocab_size <= 2**16, "model.vocab_size", vocab_size, "at most 65536 (uint16)")
        n_layers, max_seq_len = self.model.n_layers, self.model.max_seq_len
        require(n_layers <= MOST_LAYERS, "model.n_layers", n_layers, f"at most {MOST_LAYERS}")
        require(max_seq_len < 2**31, "model.max_seq_len", max_seq_len, "below 2^31")
        n_params = self.model.n_params
        require(
            n_params <= MOST_PARAMETERS,
            "model.d_model` × `model.d_ff` × `model.n_layers",
            n_params,
            "less: at most 10^16 parameters in all",
        )
        require(
            self.seq_len <= self.model.max_seq_len,
            "train.seq_len",
            self.seq_len,
            f"at most `model.max_seq_len` ({self.model.max_seq_len})",
        )
        require(
            self.train.tokens_per_step % self.seq_len == 0,
            "train.tokens_per_step",
            self.train.tokens_per_step,
            f"a multiple of the sequence length ({self.seq_len})",
        )
        require(
            self.optim.warmup_steps <= self.train.total_steps,
            "optim.warmup_steps",
            self.optim.warmup_steps,
            f"at most `train.total_steps` ({self.train.total_steps})",
        )
        decay_steps = round(self.optim.decay_fraction * self.train.total_steps)
        require(
            self.optim.schedule != "wsd"
            or self.optim.warmup_steps + decay_steps <= self.train.total_steps,
            "optim.decay_fraction",
            self.optim.decay_fraction,
            f"less: {decay_steps} steps of decay and {self.optim.warmup_steps} of "
            f"`optim.warmup_steps` do not fit into `train.total_steps` ({self.train.total_steps})",
        )
        momentum_steps = self.optim.momentum_warmup_steps + self.optim.momentum_cooldown_steps
        require(
            momentum_steps <= self.train.total_steps,
            "optim.momentum_warmup_steps` + `optim.momentum_cooldown_steps",
            momentum_steps,
            f"at most `train.total_steps` ({self.train.total_steps})",
        )
        _ = self.plan

    @cached_property
    def plan(self) -> StepPlan:
        """Tokens, batch and sequence length of every step."""
        return StepPlan(
            tokens_per_step=self.train.tokens_per_step,
            seq_len=self.seq_len,
            batch_ramp=self.train.batch_ramp,
            seq_len_ramp=self.train.seq_len_ramp,
        )

    @property
    def seq_len(self) -> int:
        """Tokens per sample of the data: the longest sequence of the run."""
        return self.train.seq_len or self.model.max_seq_len

    @property
    def batch_size(self) -> int:
        """Samples of the first global batch; see `plan` for the others."""
        return self.plan.batch_size(0)

    @property
    def micro_batch_size(self) -> int:
        """`train.micro_batch_size` once it is a number; see `matilda_train.micro_batch`."""
        size = self.train.micro_batch_size
        if size == "auto":
            raise ValueError(
                "`train.micro_batch_size` is 'auto', but no device has been asked yet."
            )
        return size

    def grad_accum_steps(self, world_size: int, step: int = 0) -> int:
        """Micro-steps of the 0-based `step` on each of `world_size` devices.

        Raises `ValueError` when the batch of any step does not divide into micro-steps.
        """
        per_micro_step = self.micro_batch_size * world_size
        for stage in self.plan.batch_stages:
            batch_size = stage.tokens_per_step // self.seq_len
            if batch_size % per_micro_step != 0:
                raise ValueError(
                    f"The global batch of {batch_size} sequences does not divide into micro-steps "
                    f"of {self.micro_batch_size} sequences on {world_size} device(s); change "
                    f"`train.micro_batch_size` or `train.tokens_per_step`."
                )
        return self.plan.batch_size(step) // per_micro_step
