"""Host tensors whose copy is left to the saving thread, and the proof that they stood still.

Training changes parameters and optimizer state in `optimizer.step()` alone, so that they may be
copied beside the next forward and backward pass. Before the caller goes on to change them, and
again before the checkpoint is published, two things noted at the call are compared: the version
counter, which in-place operations of torch raise, and elements spread over the tensor, for the
writers that do not raise it (torch's fused CPU optimizers, numpy views, `.data`, other kernels).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

AT_ONCE_BYTES = 4096
"""Smaller tensors (norms, biases, step counts, learning rates) are copied at the call."""
SAMPLES = 16


def may_wait(tensor: torch.Tensor) -> bool:
    """Whether the copy of `tensor` can be left for later: its changes must be noticeable."""
    return (
        tensor.is_cpu
        and tensor.numel() * tensor.itemsize >= AT_ONCE_BYTES
        and tensor.is_contiguous()
        and not (tensor.is_complex() or tensor.is_neg())
        and not tensor.is_inference()  # these count no versions
    )


@dataclass(frozen=True)
class _Group:
    """Tensors of one dtype, whose copies go one after the other."""

    tensors: Sequence[torch.Tensor]
    shown: Sequence[str]
    fill: Callable[[torch.Tensor, int], None]
    versions: Sequence[int]
    samples: torch.Tensor

    def changed(self) -> str | None:
        """One that seems to have been written to since it was noted."""
        now = _samples(self.tensors)
        if [tensor._version for tensor in self.tensors] == self.versions and torch.equal(
            now, self.samples
        ):
            return None
        step = now.numel() // len(self.tensors)
        for i, (tensor, version) in enumerate(zip(self.tensors, self.versions, strict=True)):
            part = slice(i * step, (i + 1) * step)
            if tensor._version != version or not torch.equal(now[part], self.samples[part]):
                return self.shown[i]
        return None


class Deferred:
    """The deferred tensors of one save: `add` in the training thread, `copy` in the saving one,
    `settle` in whichever comes first to the point where it matters."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []
        self._changed: str | None = None
        self._lock = threading.Lock()

    def add(
        self,
        tensors: Sequence[torch.Tensor],
        shown: Sequence[str],
        fill: Callable[[torch.Tensor, int], None],
    ) -> None:
        """Leave `tensors` of one dtype for later; `fill` takes the bytes of each and an offset."""
        versions = [tensor._version for tensor in tensors]
        self._groups.append(_Group(tensors, shown, fill, versions, _samples(tensors)))

    def copy(self, alive: Callable[[], None]) -> None:
        """Copy everything; `alive` is called between tensors and may raise."""
        for group in self._groups:
            offset = 0
            for tensor in group.tensors:
                alive()
                flat = tensor.detach().view(-1).view(torch.uint8)
                group.fill(flat, offset)
                offset += flat.numel()

    def settle(self) -> None:
        """Nothing is copied any more: compare once and let go of the tensors."""
        # A caller that waits here must not go on while the other thread still looks.
        with self._lock:
            for group in self._groups:
                self._changed = self._changed or group.changed()
            self._groups = []

    def changed(self) -> str | None:
        """A tensor that was changed too early. Ask once the data is written."""
        self.settle()
        return self._changed


def _samples(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Some elements of each as bytes, because NaN equals nothing."""
    with torch.no_grad():
        few = [t.as_strided((SAMPLES,), (t.numel() // SAMPLES,)) for t in tensors]
        return torch.cat(few).view(torch.uint8)
