"""Speed, utilisation and memory of the steps between two logged rows."""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any

import torch

from matilda_model import flops_per_token
from matilda_train.config import RunConfig
from matilda_train.hardware import peak_flops

__all__ = ["Meter", "describe_row"]

ROLLING_STEPS = 50
FEWEST_ROLLING_STEPS = 20
THROTTLING_SLOWDOWN = 1.10


class StepTimer:
    """The duration of one step, on the device's own clock where it has one.

    A GPU is told its work long before it does it, so the host's clock says little of one step.
    """

    def __init__(self, device: torch.device) -> None:
        self.tokens, self.seq_len = 0, 1
        self._marks: list[torch.cuda.Event] = []
        self._on_gpu = device.type == "cuda"
        self._mark()
        self._began = time.perf_counter()
        self._seconds = 0.0

    def end(self) -> None:
        """The step's last work has been given to the device."""
        self._mark()
        self._seconds = time.perf_counter() - self._began

    def seconds(self) -> float:
        """From begin to end; waits until the device is there."""
        if not self._on_gpu:
            return self._seconds
        begin, end = self._marks
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def waited(self) -> float:
        """Seconds of the host since the begin."""
        return time.perf_counter() - self._began

    def _mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)


class RollingMedian:
    """The median duration of the last 50 steps of one shape, against the lowest it has been."""

    def __init__(self) -> None:
        self._shape = (0, 0)
        self._recent: deque[float] = deque(maxlen=ROLLING_STEPS)
        self._lowest = float("inf")

    def add(self, shape: tuple[int, int], seconds: float) -> None:
        """Add a step; another (tokens, length of a sequence) than before begins anew."""
        if self._shape != shape:
            self._shape, self._lowest = shape, float("inf")
            self._recent.clear()
        self._recent.append(seconds)
        if len(self._recent) >= FEWEST_ROLLING_STEPS:
            self._lowest = min(self._lowest, statistics.median(self._recent))

    @property
    def seconds(self) -> float | None:
        """The median now; None before the first step."""
        return statistics.median(self._recent) if self._recent else None

    @property
    def has_slowed(self) -> bool:
        """Whether it stands 10 % above the lowest."""
        return (self.seconds or 0.0) > THROTTLING_SLOWDOWN * self._lowest


class Meter:
    """Sums up whole steps; evaluation, saving and abandoned steps are left out.

    `mfu_palm` counts 6·N + 12·L·H·E·T FLOPs a token (PaLM, arXiv:2204.02311, appendix B),
    `mfu_causal` half of the attention term; both are None on hardware of unknown peak.
    """

    def __init__(self, config: RunConfig, device: torch.device, world_size: int) -> None:
        self._device = device
        self._model = config.model
        peak = peak_flops(device)
        self._peak = peak * world_size if peak is not None else None
        self._step = StepTimer(device)
        self._steps: list[StepTimer] = []
        self._data_wait = self._unmeasured_wait = 0.0
        self._first_step: float | None = None
        self._warm = False
        self._recent = RollingMedian()

    def begin_step(self) -> None:
        """A step begins; what happened since the last one ended is not measured."""
        self._step = StepTimer(self._device)

    def data_arrived(self) -> None:
        """The step has its batch: until now it waited for data."""
        self._unmeasured_wait = self._step.waited()

    def end_step(self, tokens: int, seq_len: int) -> None:
        """A step of `tokens` in sequences of `seq_len` ended; others were abandoned."""
        self._step.end()
        self._step.tokens, self._step.seq_len = tokens, seq_len
        self._steps.append(self._step)
        self._data_wait += self._unmeasured_wait

    def measure(self) -> dict[str, Any]:
        """Figures for the steps since the last call, or since the start.

        The first step of a process compiles, captures and fills caches: speeds leave it out as
        soon as there is another, and what it took longer is `warm_up_seconds` in the row that
        knows. `step_ms_median` looks back over 50 steps of one shape; `throttling`, of a GPU, is
        true while it stands 10 % above the lowest it has been in this process. A CPU's steps vary
        by more with whatever else it does.
        """
        seconds = [step.seconds() for step in self._steps]
        first = int(self._first_step is None)
        if self._first_step is None:
            self._first_step = seconds[0]
        # The first step alone: all there is to report.
        steady = slice(first if len(seconds) > first else 0, None)
        spent, mean = sum(seconds[steady]), statistics.fmean(seconds[steady])
        for step, duration in zip(self._steps[first:], seconds[first:], strict=True):
            self._recent.add((step.tokens, step.seq_len), duration)
        median = self._recent.seconds or statistics.median(seconds)
        row: dict[str, Any] = {
            "step_ms": 1e3 * mean,
            "step_ms_median": 1e3 * median,
            "tokens_per_second": sum(step.tokens for step in self._steps[steady]) / spent,
            "data_wait_ms": 1e3 * self._data_wait / len(seconds),
            "train_seconds": sum(seconds),
        }
        if len(seconds) > first and not self._warm:
            self._warm = True
            row["warm_up_seconds"] = max(0.0, self._first_step - mean)
        for name, causal in (("mfu_palm", False), ("mfu_causal", True)):
            flops = sum(
                step.tokens * flops_per_token(self._model, step.seq_len, causal=causal)
                for step in self._steps[steady]
            )
            row[name] = flops / spent / self._peak if self._peak is not None else None
        if self._device.type == "cuda":
            row["throttling"] = self._recent.has_slowed
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        self._steps, self._data_wait = [], 0.0
        return row


def describe_row(row: dict[str, Any]) -> str:
    """A metrics row as a person reads it beside the progress bar."""
    parts = [f"loss {row['loss_nats']:.4f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    if row["mfu_palm"] is not None:
        parts.append(f"MFU {100 * row['mfu_palm']:.1f} %")
    if row.get("throttling"):
        reasons = row.get("gpu_throttle_reasons")
        parts.append(f"slower than before ({reasons})" if reasons else "slower than before")
    return " · ".join(parts)
