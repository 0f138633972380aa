"""Small device arrays that mirror host values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_RING = 4


class DeviceTable:
    """A small device array refreshed from host values only when they change.

    Copies go through a ring of pinned buffers, so the host runs ahead of the device by up to
    `_RING` changes before it waits. Under graph capture the buffer is retired: replays read it.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(count, dtype=dtype, device=device)
        self._host: list[Tensor] = []
        self._events: list[torch.cuda.Event | None] = []
        self._next = 0
        self._retired: list[Tensor] = []
        self._values: list[Any] | None = None
        for _ in range(_RING if device.type == "cuda" else 0):
            self._grow()

    def _grow(self) -> None:
        self._host.append(torch.empty_like(self.tensor, device="cpu", pin_memory=True))
        self._events.append(None)

    def set(self, values: list[Any]) -> Tensor:
        """Uploads `values` if they differ from the last ones; returns the device array."""
        if values == self._values:
            return self.tensor
        self._values = values
        if self.tensor.device.type != "cuda":  # Triton's interpreter
            return self.tensor.copy_(torch.tensor(values, dtype=self.tensor.dtype))
        slot = self._next % len(self._host)
        self._next += 1
        event = self._events[slot]
        host = self._host[slot]
        capturing = torch.cuda.is_current_stream_capturing()
        if event is not None and not capturing:
            event.synchronize()
        host.copy_(torch.tensor(values, dtype=host.dtype))
        self.tensor.copy_(host, non_blocking=True)
        if capturing:
            self._retired.append(self._host.pop(slot))
            self._events.pop(slot)
        else:
            event = event or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._events[slot] = event
        return self.tensor
