"""The CUDA back end: batches of matrices through `triton_kernels`, with no host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from matilda_optim import triton_kernels as kernels
from matilda_optim.coefficients import Quintic
from matilda_optim.device_table import DeviceTable
from matilda_optim.reference import Share
from matilda_optim.triton_products import newton_schulz, padded_shape

ELEMENT_TILE = 64
GATHER_LEAD = 256
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Matrix(NamedTuple):
    """One block of one parameter: a contiguous (rows, cols) region `offset` elements in."""

    param: Tensor
    momentum: Tensor
    offset: int
    rows: int
    cols: int
    ratio: float
    group: dict[str, Any]


class KernelKey(NamedTuple):
    """What the matrices of one batch have in common."""

    rows: int
    cols: int
    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    ns_dtype: torch.dtype
    quintics: tuple[Quintic, ...]
    nesterov: bool
    cautious: bool
    skip: bool


class KernelClass:
    """The static part of one batch: shapes and tables for its matrices."""

    def __init__(self, key: KernelKey, matrices: Sequence[Matrix]) -> None:
        self.key = key
        self.matrices = list(matrices)
        self.m, self.n = padded_shape(key.rows, key.cols)
        batch, device = len(self.matrices), key.device
        self.chunk = 0
        self.addresses = DeviceTable(3 * batch, torch.int64, device)
        self.hyper = DeviceTable(4 * batch, torch.float32, device)
        self._own_combined = torch.zeros(batch, 4, dtype=torch.float32, device=device)
        self.combined = self._own_combined
        shapes = [[matrix.rows, matrix.cols] for matrix in self.matrices]
        self.shapes = torch.tensor(shapes, dtype=torch.int32, device=device)
        self.counters = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        self.norms = torch.zeros(batch, dtype=torch.float64, device=device)
        self.tiles_n = self.n // ELEMENT_TILE
        self.tiles = self.tiles_n * (self.m // ELEMENT_TILE)
        # no padding: every tile lies inside its matrix and needs no mask
        self.whole = (key.rows, key.cols) == (self.m, self.n)

    def prepare(self) -> bool:
        """Brings the tables up to date; returns whether every access can be a vector access."""
        even = self._addresses()
        self._hyper()
        return even

    def launch(self, even: bool, share: Share) -> None:
        """Momentum, orthogonalisation and update of every matrix; reads the tables alone."""
        key, batch = self.key, len(self.matrices)
        addresses, hyper = self.addresses.tensor, self.combined
        x_BMN = torch.empty(batch, self.m, self.n, dtype=key.ns_dtype, device=key.device)
        partial = torch.empty(batch * self.tiles, dtype=torch.float64, device=key.device)
        lead = min(GATHER_LEAD, self.tiles)
        kernels.gather_kernel[(2 * batch * self.tiles + lead,)](
            addresses[:batch],
            addresses[batch : 2 * batch],
            self.shapes,
            hyper,
            x_BMN,
            partial,
            self.counters,
            self.norms,
            batch,
            lead,
            self.m,
            self.n,
            self.tiles_n,
            self.tiles,
            TILES_POW2=triton.next_power_of_2(self.tiles),
            TILE=ELEMENT_TILE,
            GRAD=_TL[key.grad_dtype],
            NESTEROV=key.nesterov,
            SKIP=key.skip,
            EVEN=even,
            PHASE=0,
            enable_fp_fusion=True,  # stated: the default is about to change, and bits with it
        )
        x_BMN = share(x_BMN, lambda x: newton_schulz(x, key.quintics, self.chunk))
        kernels.update_kernel[(batch * self.tiles,)](
            addresses[2 * batch :],
            self.shapes,
            hyper,
            self.norms,
            x_BMN,
            self.m,
            self.n,
            self.tiles_n,
            self.tiles,
            TILE=ELEMENT_TILE,
            PARAM=_TL[key.param_dtype],
            CAUTIOUS=key.cautious,
            SKIP=key.skip,
            EVEN=even,
            enable_fp_fusion=True,
        )

    def _addresses(self) -> bool:
        grads: list[int] = []
        momenta: list[int] = []
        params: list[int] = []
        self._kept = []
        for matrix in self.matrices:
            grad = matrix.param.grad
            assert grad is not None
            if not grad.is_contiguous():
                grad = grad.contiguous()
                self._kept.append(grad)
            grads.append(grad.data_ptr() + matrix.offset * grad.element_size())
            momenta.append(matrix.momentum.data_ptr() + matrix.offset * 4)
            params.append(matrix.param.data_ptr() + matrix.offset * matrix.param.element_size())
        values = grads + momenta + params
        self.addresses.set(values)
        return self.whole and all(address % 16 == 0 for address in values)

    def _hyper(self) -> None:
        values: list[float] = []
        on_device = False
        for matrix in self.matrices:
            group = matrix.group
            lr = group["lr"]
            if isinstance(lr, Tensor):
                on_device = on_device or lr.is_cuda
                lr = 0.0 if lr.is_cuda else float(lr)
            values += [
                1.0 - group["momentum"],
                -1.0 if group["maximize"] else 1.0,
                1.0 - lr * group["weight_decay"],
                lr * matrix.ratio,
            ]
        if on_device:
            self._device_hyper(values)
        else:
            self.combined = self.hyper.set(values).view(-1, 4)

    def _device_hyper(self, values: list[float]) -> None:
        """Learning rates that live on the device are combined there."""
        for i, matrix in enumerate(self.matrices):
            values[4 * i + 2] = matrix.group["weight_decay"]
            values[4 * i + 3] = matrix.ratio
        table = self.hyper.set(values).view(-1, 4)
        rates = torch.stack(
            [
                torch.as_tensor(m.group["lr"], dtype=torch.float32, device=self.key.device).view(())
                for m in self.matrices
            ]
        )
        keep = 1.0 - rates * table[:, 2]
        self.combined = self._own_combined
        torch.stack([table[:, 0], table[:, 1], keep, rates * table[:, 3]], dim=1, out=self.combined)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class KernelPlan:
    """All classes of one step, launched one after the other, or replayed as one CUDA graph.

    In the graph each class runs on a stream of its own: the classes are independent, so one's
    products hide another's memory traffic and the tails of its launches. It is captured on the
    third step; the kernels find gradients and hyper-parameters through tables uploaded before.
    """

    def __init__(self, classes: Sequence[KernelClass], graph: bool) -> None:
        # largest first: the small ones fill its gaps
        self.classes = sorted(classes, key=lambda c: -c.m * c.n * len(c.matrices))
        self.graph = graph
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._steps = 0

    def step(self, share: Share, shared: bool) -> None:
        """One step; `shared` says that `share` communicates, which is not captured here."""
        even = [kernel_class.prepare() for kernel_class in self.classes]
        self._steps += 1
        if not self._replayable(shared):
            for kernel_class, whole in zip(self.classes, even, strict=True):
                with _on(kernel_class.key.device):
                    kernel_class.launch(whole, share)
            return
        key = (*even, *(c.combined.data_ptr() for c in self.classes))
        with torch.cuda.device(self.classes[0].key.device):
            if key not in self._graphs:
                self._graphs[key] = self._capture(even, share)
            self._graphs[key].replay()

    def _replayable(self, shared: bool) -> bool:
        devices = {c.key.device for c in self.classes}
        return (
            self.graph
            and not shared
            and self._steps > 2  # the first steps compile the kernels
            and len(devices) == 1
            and devices.pop().type == "cuda"
            and not torch.cuda.is_current_stream_capturing()
        )

    def _capture(self, even: Sequence[bool], share: Share) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            main = torch.cuda.current_stream()
            streams = []
            for i, (kernel_class, whole) in enumerate(zip(self.classes, even, strict=True)):
                # the first, largest class is the longest chain of launches and goes first
                stream = torch.cuda.Stream(priority=-1 if i == 0 else 0)  # type: ignore[no-untyped-call]
                streams.append(stream)
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    kernel_class.launch(whole, share)
            for stream in streams:
                main.wait_stream(stream)
        return graph
