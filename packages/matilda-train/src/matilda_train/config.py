"""What a run is: one frozen, validated value per config section.

A config file is JSON with the sections `model`, `optim`, `data`, `train`, `eval`, `ckpt` and
`log`; `matilda_train.load_config` turns it into a `RunConfig`. Every field states its unit and
default below it, and is checked where it is defined.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from matilda_model import ModelConfig

__all__ = [
    "CkptConfig",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
]


def _require(condition: bool, field_name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"`{field_name}` is {value!r}, but must be {expected}.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    algorithm: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon for hidden matrices, AdamW for the rest. `adamw`: AdamW for everything."""

    lr: float = 0.02
    """Peak learning rate of the hidden matrices."""

    adamw_lr: float | None = None
    """Peak learning rate of embeddings, norms and scalars; null means `lr`."""

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

    final_lr_fraction: float = 0.0
    """Learning rate at the end of the run, as a fraction of its peak."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "positive")
        _require(
            self.adamw_lr is None or self.adamw_lr > 0, "optim.adamw_lr", self.adamw_lr, "positive"
        )
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(
            self.adamw_weight_decay >= 0,
            "optim.adamw_weight_decay",
            self.adamw_weight_decay,
            "0 or more",
        )
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "in [0, 1)")
        _require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "in [0, 1)")
        _require(self.eps > 0, "optim.eps", self.eps, "positive")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        _require(
            0 <= self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "in [0, 1]"
        )
        _require(
            0 <= self.final_lr_fraction <= 1,
            "optim.final_lr_fraction",
            self.final_lr_fraction,
            "in [0, 1]",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from."""

    dir: str | None = None
    """Folder of a prepared data set (`manifest.json` beside its shards); `--data-dir` sets it."""

    tokenizer: Literal["byte", "gpt2"] = "gpt2"
    """Tokenizer the data set must have been prepared with."""

    corpus: Literal["python-stdlib"] | None = None
    """Corpus to prepare when `dir` is missing: the source of Python's own standard library needs
    no download. null: the data set must exist."""

    seed: int = 0
    """Seed of the order in which training windows are visited."""

    mix: tuple[str, ...] = ()
    """Weights of the data set's sources, as in `["prose=83,code=17"]`; empty takes those it was
    prepared with. Further entries hold from a step on: `"900: prose=1,code=1"` after step 900."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision and device of the run."""

    total_steps: int = 1000
    """Optimizer steps of the whole run."""

    tokens_per_step: int = 524_288
    """Tokens of one global batch, over all devices and micro-steps."""

    micro_batch_size: int = 8
    """Sequences per device and micro-step: speed and memory only, never the mathematics."""

    seq_len: int | None = None
    """Tokens per sequence; null means `model.max_seq_len`."""

    seed: int = 1337
    """Seed of the weights' initialisation and of every other random number of the run."""

    grad_clip: float = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""

    max_consecutive_skips: int = 5
    """A step whose loss or gradient is not finite is skipped; this many in a row end the run."""

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

    threads: int | None = None
    """CPU threads of torch; null leaves torch's choice. Results on a CPU depend on it."""

    def __post_init__(self) -> None:
        for name in ("total_steps", "tokens_per_step", "micro_batch_size", "max_consecutive_skips"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        _require(self.seq_len is None or self.seq_len >= 1, "train.seq_len", self.seq_len, "1+")
        _require(self.grad_clip >= 0, "train.grad_clip", self.grad_clip, "0 or more")
        _require(self.threads is None or self.threads >= 1, "train.threads", self.threads, "1+")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the held-out part of the data set."""

    every_steps: int = 250
    """Steps between evaluations, besides one before the first step and one at the end."""

    tokens: int = 1_048_576
    """Held-out tokens per evaluation, at most as many as there are."""

    sample_prompt: str = ""
    """Prompt of the sample that closes the run; empty: the sample begins a new document."""

    sample_tokens: int = 200
    """Length of that sample in tokens; 0 for none."""

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "eval.every_steps", self.every_steps, "1 or more")
        _require(self.tokens >= 1, "eval.tokens", self.tokens, "1 or more")
        _require(self.sample_tokens >= 0, "eval.sample_tokens", self.sample_tokens, "0 or more")


@dataclass(frozen=True, kw_only=True)
class CkptConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int = 1000
    """Steps between checkpoints, besides one at the end and one when the run is stopped."""

    background: bool = True
    """Write checkpoints beside training: it stops only while the state is copied."""

    keep_last: int = 3
    """Newest checkpoints to keep, never fewer than two."""

    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this; null for none."""

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "ckpt.every_steps", self.every_steps, "1 or more")
        _require(self.keep_last >= 2, "ckpt.keep_last", self.keep_last, "2 or more")
        _require(
            self.keep_every is None or self.keep_every >= 1,
            "ckpt.keep_every",
            self.keep_every,
            "1 or more",
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down while training."""

    every_steps: int = 10
    """Steps between rows of `metrics.jsonl`; a row describes its own step, not an average."""

    wandb: bool = False
    """Also log to Weights & Biases (needs `matilda-train[wandb]`)."""

    wandb_project: str = "matilda"
    """Project name at Weights & Biases."""

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "log.every_steps", self.every_steps, "1 or more")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `seq_len`, `batch_size` and `grad_accum_steps` are derived, never stated."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    ckpt: CkptConfig = field(default_factory=CkptConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _require(
            self.seq_len <= self.model.max_seq_len,
            "train.seq_len",
            self.seq_len,
            f"at most `model.max_seq_len` ({self.model.max_seq_len})",
        )
        _require(
            self.train.tokens_per_step % self.seq_len == 0,
            "train.tokens_per_step",
            self.train.tokens_per_step,
            f"a multiple of the sequence length ({self.seq_len})",
        )
        _require(
            self.optim.warmup_steps <= self.train.total_steps,
            "optim.warmup_steps",
            self.optim.warmup_steps,
            f"at most `train.total_steps` ({self.train.total_steps})",
        )

    @property
    def seq_len(self) -> int:
        """Tokens per training sequence."""
        return self.train.seq_len or self.model.max_seq_len

    @property
    def batch_size(self) -> int:
        """Sequences of one global batch."""
        return self.train.tokens_per_step // self.seq_len

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-steps per optimizer step on each of `world_size` devices."""
        per_micro_step = self.train.micro_batch_size * world_size
        if self.batch_size % per_micro_step != 0:
            raise ValueError(
                f"The global batch of {self.batch_size} sequences does not divide into micro-steps "
                f"of {self.train.micro_batch_size} sequences on {world_size} device(s); change "
                f"`train.micro_batch_size` or `train.tokens_per_step`."
            )
        return self.batch_size // per_micro_step
