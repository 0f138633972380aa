"""Speed, utilisation and memory of the steps between two logged rows."""

from __future__ import annotations

import time
from typing import Any

import torch

from matilda_model import flops_per_token
from matilda_train.config import RunConfig
from matilda_train.hardware import peak_flops

__all__ = ["Meter", "describe_row"]


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
        self._forget()
        self._began = time.perf_counter()

    def begin_step(self) -> None:
        """A step begins; what happened since the last one ended is not measured."""
        self._began = time.perf_counter()

    def data_arrived(self) -> None:
        """The step has its batch: until now it waited for data."""
        self._data_wait += time.perf_counter() - self._began

    def end_step(self, tokens: int, seq_len: int) -> None:
        """A step of `tokens` in sequences of `seq_len` ended.

        The loop has read its loss, so the clock covers finished device work.
        """
        self._seconds += time.perf_counter() - self._began
        self._steps += 1
        self._tokens += tokens
        for name, causal in (("mfu_palm", False), ("mfu_causal", True)):
            self._flops[name] += tokens * flops_per_token(self._model, seq_len, causal=causal)

    def measure(self) -> dict[str, Any]:
        """Figures for the steps since the last call, or since the start."""
        row: dict[str, Any] = {
            "step_ms": 1e3 * self._seconds / self._steps,
            "tokens_per_second": self._tokens / self._seconds,
            "data_wait_ms": 1e3 * self._data_wait / self._steps,
        }
        for name, flops in self._flops.items():
            row[name] = flops / self._seconds / self._peak if self._peak is not None else None
        if self._device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        self._forget()
        return row

    def _forget(self) -> None:
        self._steps, self._tokens, self._seconds, self._data_wait = 0, 0, 0.0, 0.0
        self._flops = {"mfu_palm": 0, "mfu_causal": 0}


def describe_row(row: dict[str, Any]) -> str:
    """A metrics row as a person reads it beside the progress bar."""
    parts = [f"loss {row['loss_nats']:.4f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    if row["mfu_palm"] is not None:
        parts.append(f"MFU {100 * row['mfu_palm']:.1f} %")
    return " · ".join(parts)
