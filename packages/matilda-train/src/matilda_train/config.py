"""What a run is: one frozen, validated value per config section.

A config file is JSON with the sections `model`, `optim`, `data`, `train`, `eval`, `ckpt` and
`log`; `matilda_train.load_config` turns it into a `RunConfig`. Every field states its unit and
default below it, and is checked where it is defined.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from matilda_model import ModelConfig
from matilda_train.duration import Duration
from matilda_train.step_plan import StepPlan

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


def _interval(every: int | str | None, every_steps: int, section: str) -> Duration:
    """`every` where it is given, else `every_steps`; `ValueError` naming the field."""
    if every is None:
        _require(every_steps >= 1, f"{section}.every_steps", every_steps, "1 or more")
        return Duration(every_steps, "steps")
    try:
        interval = Duration.parse(every)
    except ValueError as error:
        raise ValueError(f"`{section}.every`: {error}") from None
    _require(interval.amount > 0, f"{section}.every", every, "above 0")
    return interval


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
        _require(
            0 <= self.final_weight_decay_fraction <= 1,
            "optim.final_weight_decay_fraction",
            self.final_weight_decay_fraction,
            "in [0, 1]",
        )
        for name in ("batch_lr_exponent", "momentum_warmup_steps", "momentum_cooldown_steps"):
            _require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "0 or more")
        _require(
            0 <= self.momentum_start < 1, "optim.momentum_start", self.momentum_start, "in [0, 1)"
        )

    @property
    def momentum_is_scheduled(self) -> bool:
        """Whether Muon's momentum is anything but constant."""
        return self.momentum_warmup_steps > 0 or self.momentum_cooldown_steps > 0


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
    prepared with. Further entries hold from a point on: `"900: prose=1,code=1"` after step 900,
    `"1B tokens: prose=1,code=1"` after a billion tokens."""


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
    """A spike is this many standard deviations above the running mean of some hundred steps."""

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
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        _require(0 <= self.seed < 2**32, "train.seed", self.seed, "0 or more and below 2^32")
        size = self.micro_batch_size
        _require(
            size == "auto" or size >= 1, "train.micro_batch_size", size, "1 or more, or 'auto'"
        )
        _require(self.seq_len is None or self.seq_len >= 1, "train.seq_len", self.seq_len, "1+")
        _require(self.grad_clip >= 0, "train.grad_clip", self.grad_clip, "0 or more")
        _require(
            self.hang_seconds is None or self.hang_seconds > 0,
            "train.hang_seconds",
            self.hang_seconds,
            "positive",
        )
        for name in ("rollback_margin_steps", "max_rollbacks"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        _require(self.spike_threshold > 0, "train.spike_threshold", self.spike_threshold, "above 0")
        _require(
            self.spike_warmup_steps >= 2,
            "train.spike_warmup_steps",
            self.spike_warmup_steps,
            "2 or more",
        )
        _require(self.threads is None or self.threads >= 1, "train.threads", self.threads, "1+")


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
        _require(self.tokens >= 1, "eval.tokens", self.tokens, "1 or more")
        _require(
            self.task_limit is None or self.task_limit >= 1,
            "eval.task_limit",
            self.task_limit,
            "1 or more",
        )
        _require(
            not self.tasks or self.task_dir is not None,
            "eval.task_dir",
            self.task_dir,
            "the folder of the task files that `eval.tasks` names",
        )
        _require(
            len(set(self.tasks)) == len(self.tasks), "eval.tasks", self.tasks, "without repetition"
        )
        _require(self.sample_tokens >= 0, "eval.sample_tokens", self.sample_tokens, "0 or more")

    @property
    def interval(self) -> Duration:
        """Time between evaluations."""
        return _interval(self.every, self.every_steps, "eval")

    @property
    def tasks_interval(self) -> Duration | None:
        """Time between scorings of `tasks`; None: every evaluation has one."""
        if self.tasks_every is None:
            return None
        try:
            interval = Duration.parse(self.tasks_every)
        except ValueError as error:
            raise ValueError(f"`eval.tasks_every`: {error}") from None
        _require(interval.amount > 0, "eval.tasks_every", self.tasks_every, "above 0")
        return interval


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
        _require(self.keep_last >= 2, "ckpt.keep_last", self.keep_last, "2 or more")
        _require(
            self.keep_every is None or self.keep_every >= 1,
            "ckpt.keep_every",
            self.keep_every,
            "1 or more",
        )

    @property
    def interval(self) -> Duration:
        """Time between checkpoints."""
        return _interval(self.every, self.every_steps, "ckpt")

    @property
    def also_steps(self) -> int | None:
        """Checkpoints are also written at multiples of this many steps; None: at no others."""
        return None if self.interval.unit == "steps" else self.keep_every


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down while training."""

    every_steps: int = 10
    """Steps between rows of `metrics.jsonl`; a row describes its own step, not an average."""

    every: int | str | None = None
    """The same as a duration, such as `"1M tokens"` or `"10 s"`; null means `every_steps`."""

    rms_every_steps: int = 50
    """Steps between rows that also hold the RMS of every optimizer group's parameters and of their
    change; such a step is about a millisecond longer for 152M parameters on an H100."""

    autopsies: int = 5
    """Bundles to write on bad steps (not finite, or a spike), the run's first; 0 for none."""

    wandb: bool = False
    """Also log to Weights & Biases (needs `matilda-train[wandb]`), by a process beside the run's;
    what cannot be sent is kept in the run directory for `wandb sync`."""

    wandb_project: str = "matilda"
    """Project name at Weights & Biases."""

    def __post_init__(self) -> None:
        _ = self.interval
        _require(
            self.rms_every_steps >= 1, "log.rms_every_steps", self.rms_every_steps, "1 or more"
        )
        _require(self.autopsies >= 0, "log.autopsies", self.autopsies, "0 or more")

    @property
    def interval(self) -> Duration:
        """Time between rows."""
        return _interval(self.every, self.every_steps, "log")


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
        decay_steps = round(self.optim.decay_fraction * self.train.total_steps)
        _require(
            self.optim.schedule != "wsd"
            or self.optim.warmup_steps + decay_steps <= self.train.total_steps,
            "optim.decay_fraction",
            self.optim.decay_fraction,
            f"less: {decay_steps} steps of decay and {self.optim.warmup_steps} of "
            f"`optim.warmup_steps` do not fit into `train.total_steps` ({self.train.total_steps})",
        )
        momentum_steps = self.optim.momentum_warmup_steps + self.optim.momentum_cooldown_steps
        _require(
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
