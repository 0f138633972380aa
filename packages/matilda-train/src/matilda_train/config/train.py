"""The `train` section: length, batch, precision, device, and what a bad step leads to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from matilda_train.config.checks import require

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and device of the run."""

    total_steps: int = 1000
    """Optimizer steps of the whole run."""

    tokens_per_step: int = 524_288
    """Tokens of one global batch, over all devices and micro-steps."""

    micro_batch_size: Literal["auto"] | int = 8
    """Sequences per device and micro-step: speed and memory only, never the mathematics. `auto`: on
    a GPU the largest power of two that fits, found by real steps at the start; on a CPU 8."""

    batch_ramp: tuple[str, ...] = ()
    """Larger batches later: `["1B tokens: 1048576"]` takes that many tokens a step once a billion
    tokens are done. Points are steps or tokens; the learning rate: `optim.batch_lr_exponent`."""

    seq_len: int | None = None
    """Tokens per sequence; null means `model.max_seq_len`."""

    seq_len_ramp: tuple[str, ...] = ()
    """Shorter sequences at first: `["0 steps: 256", "500 steps: 1024"]` cuts every sequence of the
    data into parts of 256 tokens, from step 500 on into parts of 1024. Same tokens, same order."""

    seed: int = 1337
    """Seed of the weights' initialisation and of every other random number of the run."""

    grad_clip: float = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""

    max_consecutive_skips: int = 5
    """A step whose loss or gradient is not finite is skipped; this many in a row end the run."""

    spike_policy: Literal["warn", "skip", "rollback", "off"] = "warn"
    """What a spike of the loss or the gradient norm leads to: `warn`, an event; `skip`, an event
    and no update; `rollback`, a return to a checkpoint before it and the samples around it left
    out; `off`, nothing. May change at a resume."""

    spike_threshold: float = 6.0
    """A spike is this many standard deviations above the running mean of some hundred steps; a
    gradient norm is none below twice that mean."""

    spike_warmup_steps: int = 100
    """First steps of the run, whose loss and gradient norm are only learned from."""

    rollback_margin_steps: int = 8
    """A rollback leaves out the samples of the spike's step and of so many before and after it."""

    max_rollbacks: int = 3
    """The next spike after so many rollbacks ends the run."""

    device: str = "auto"
    """`auto` (the GPU if there is one), `cpu`, `cuda`, `cuda:1`, …"""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype; weights and optimizer state stay float32. `auto`: bfloat16 on a GPU."""

    compile: bool = True
    """Compile the model with torch.compile."""

    check_kernels: bool = True
    """On a GPU: compare every kernel with float32 arithmetic before the first step, in seconds. A
    wrong one that `auto` chose is replaced, a wrong one of the config's ends the run."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks share the work: `ddp` keeps everything on each, `fsdp` divides weights,
    gradients and optimizer state over them (FSDP2). May change at a resume."""

    deterministic: bool = False
    """Use deterministic kernels only: bit-for-bit repeatable on a GPU too, but slower."""

    hang_seconds: float | None = 900.0
    """A process without progress for so long names where it hangs and ends with exit code 5, to be
    started again; four times as long until its first step has ended. null: never."""

    threads: int | None = None
    """CPU threads of torch; null leaves torch's choice. Results on a CPU depend on it."""

    def __post_init__(self) -> None:
        for name in ("total_steps", "tokens_per_step", "max_consecutive_skips"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        require(
            self.seq_len is None or self.seq_len >= 1, "train.seq_len", self.seq_len, "1 or more"
        )
        threads = self.threads
        require(
            threads is None or 1 <= threads <= 4096, "train.threads", threads, "1 to 4096, or null"
        )
        size = self.micro_batch_size
        require(size == "auto" or size >= 1, "train.micro_batch_size", size, "1 or more, or 'auto'")
        for name in ("grad_clip", "rollback_margin_steps", "max_rollbacks"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        for name in ("hang_seconds", "spike_threshold"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}", value, "above 0")
        warmup = self.spike_warmup_steps
        require(warmup >= 2, "train.spike_warmup_steps", warmup, "2 or more")
        require(0 <= self.seed < 2**32, "train.seed", self.seed, "0 or more and below 2^32")
