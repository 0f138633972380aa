"""Real optimizer steps on random tokens, to see what fits into memory and how long a step takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from matilda_train.build import build_model, build_optimizer, compile_blocks, compile_model
from matilda_train.config import RunConfig
from matilda_train.errors import is_out_of_memory
from matilda_train.guards import StepGuard, clip_gradients
from matilda_train.hardware import choose_dtype
from matilda_train.state_digest import leaves

__all__ = ["StepTrial", "TrialRun", "largest_that_fits"]

MEMORY_SHARE = 0.92
"""Most of the memory that is free for this process which a step may take: evaluation, sampling and
the allocator's gaps need the rest."""

# Muon replays its kernels as a graph from its third step on, which takes memory of its own.
STEPS_ON_GPU, STEPS_ON_CPU = 4, 2


@dataclass(frozen=True)
class StepTrial:
    """What came of a step with `micro_batch_size` sequences a micro-step."""

    micro_batch_size: int
    fits: bool
    peak_bytes: int | None = None
    """Largest memory at once on a GPU, weights and optimizer state included; None on a CPU."""
    micro_step_seconds: float | None = None
    """Forward and backward of one micro-step, compiled and warm."""
    update_seconds: float | None = None
    """Clipping and the optimizer's step."""


class TrialRun:
    """A model and its optimizer for trials only; `close` gives their memory back.

    On one device: with several ranks each tries for itself, without their exchange.
    """

    def __init__(self, config: RunConfig, device: torch.device, world_size: int = 1) -> None:
        self._config = config
        self._device = device
        self._on_gpu = device.type == "cuda"
        self.budget_bytes: int | None = None
        """Bytes that a step may take on a GPU; None on a CPU."""
        if self._on_gpu:
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(device)
            self.budget_bytes = int(MEMORY_SHARE * (free + torch.cuda.memory_reserved(device)))
        self.model = build_model(config, device, choose_dtype(config.train.dtype, device))
        self.optimizer = build_optimizer(config.optim, self.model)
        self._compiled: nn.Module = self.model
        if config.train.compile and world_size == 1:
            self._compiled = compile_model(self.model)
        elif config.train.compile:
            compile_blocks(self.model)

    @property
    def fixed_bytes(self) -> int:
        """Weights, gradients and optimizer state."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return weights + self.state_bytes

    @property
    def state_bytes(self) -> int:
        """Tensors of a checkpoint: weights and optimizer state."""
        values = (value for _, value in leaves([self.model, self.optimizer]))
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))

    def attempt(self, micro_batch_size: int) -> StepTrial:
        """A few real steps with that many sequences of the longest length."""
        trial = StepTrial(micro_batch_size, fits=False)
        try:
            trial = self._steps(micro_batch_size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Only now: while the error lives, its frames hold the step's tensors.
        self.optimizer.zero_grad(set_to_none=True)
        self._clean()
        return trial

    def close(self) -> None:
        """Drop everything, compiled code too."""
        del self.model, self.optimizer, self._compiled
        torch._dynamo.reset()
        self._clean()

    def _steps(self, micro_batch_size: int) -> StepTrial:
        config, parameters = self._config, list(self.model.parameters())
        micro_steps = min(2, max(1, config.batch_size // micro_batch_size))
        generator = torch.Generator().manual_seed(0)
        shape = (micro_batch_size, config.seq_len + 1)
        ids = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        inputs, targets = (t.contiguous().to(self._device) for t in (ids[:, :-1], ids[:, 1:]))
        guard = StepGuard(self._device)
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        for _ in range(STEPS_ON_GPU if self._on_gpu else STEPS_ON_CPU):
            began = self._now()
            for _ in range(micro_steps):
                loss = self._compiled(inputs, targets).loss
                loss.backward()
            forth_and_back = self._now()
            clip_gradients(parameters, config.train.grad_clip, loss.detach(), guard)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            ended = self._now()
        peak = torch.cuda.max_memory_allocated(self._device) if self._on_gpu else None
        return StepTrial(
            micro_batch_size,
            fits=peak is None or self.budget_bytes is None or peak <= self.budget_bytes,
            peak_bytes=peak,
            micro_step_seconds=(forth_and_back - began) / micro_steps,
            update_seconds=ended - forth_and_back,
        )

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _clean(self) -> None:
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)


def largest_that_fits(
    run: TrialRun,
    sizes: Sequence[int],
    *,
    tried: Callable[[StepTrial], None] = lambda trial: None,
) -> StepTrial | None:
    """The largest of `sizes`, ascending, whose step fits; None when none does.

    On a GPU the memory of one trial tells which size to try next, so that two or three trials
    suffice; elsewhere every size is tried, from the largest down. `tried` hears of each.
    """
    below, above, best = -1, len(sizes), None
    budget = run.budget_bytes
    guess = max((i for i, size in enumerate(sizes) if size <= 4), default=0)
    if budget is None:
        guess = len(sizes) - 1
    while below + 1 < above:
        trial = run.attempt(sizes[guess])
        tried(trial)
        if not trial.fits:
            above = guess
            guess = max(below + 1, above - 1)
            continue
        below, best = guess, trial
        if budget is None or trial.peak_bytes is None:
            break
        per_sequence = (trial.peak_bytes - run.fixed_bytes) / trial.micro_batch_size
        most = trial.micro_batch_size + (budget - trial.peak_bytes) / max(per_sequence, 1)
        promising = [i for i, size in enumerate(sizes) if below < i < above and size <= most]
        if not promising:
            break
        guess = promising[-1]
    return best
