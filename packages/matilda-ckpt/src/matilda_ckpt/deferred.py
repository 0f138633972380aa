"""Host tensors whose copy is left to the saving thread, and the proof that they stood still.

Training changes parameters and optimizer state in `optimizer.step()` alone, so that they may be
copied beside the next forward and backward pass. Before the caller goes on to change them, and
again before the checkpoint is published, two things noted at the call are compared: the version
counter, which in-place operations of torch raise, and elements spread over the tensor, for the
writers that do not raise it (torch's fused CPU optimizers, numpy views, `.data`, other kernels).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

AT_ONCE_BYTES = 1024
"""Smaller tensors (step counts, learning rates, biases) are copied at the call."""
SAMPLES = 16


@dataclass(frozen=True)
class _Left:
    shown: str
    tensor: torch.Tensor
    fill: Callable[[torch.Tensor], None]
    version: int
    sample: torch.Tensor

    def stands(self) -> bool:
        """Whether nothing seems to have been written to it since it was noted."""
        return self.tensor._version == self.version and torch.equal(
            _sample(self.tensor), self.sample
        )


class Deferred:
    """The deferred tensors of one save: `add` in the training thread, `copy` in the saving one,
    `settle` in whichever comes first to the point where it matters."""

    def __init__(self) -> None:
        self._left: list[_Left] = []
        self._changed: str | None = None
        self._lock = threading.Lock()

    def add(self, shown: str, tensor: torch.Tensor, fill: Callable[[torch.Tensor], None]) -> bool:
        """Leave `tensor` for later, when `fill` takes its bytes; False where it must not wait."""
        tensor = tensor.detach()
        if (
            tensor.numel() * tensor.itemsize < AT_ONCE_BYTES
            or not tensor.is_contiguous()
            or tensor.is_complex()
            or tensor.is_neg()
            or tensor.is_inference()  # these count no versions
        ):
            return False
        self._left.append(_Left(shown, tensor, fill, tensor._version, _sample(tensor)))
        return True

    def copy(self, alive: Callable[[], None]) -> None:
        """Copy everything; `alive` is called between tensors and may raise."""
        for left in self._left:
            alive()
            left.fill(left.tensor.view(-1).view(torch.uint8))

    def settle(self) -> None:
        """Nothing is copied any more: compare once and let go of the tensors."""
        # A caller that waits here must not go on while the other thread still looks.
        with self._lock:
            for left in self._left:
                if self._changed is None and not left.stands():
                    self._changed = left.shown
            self._left = []

    def changed(self) -> str | None:
        """A tensor that was changed too early. Ask once the data is written."""
        self.settle()
        return self._changed


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of about 16 elements; as bytes, because NaN equals nothing."""
    flat = tensor.view(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)].clone().view(torch.uint8)
