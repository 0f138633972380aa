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
from matilda_optim.triton_products import newton_schulz, padded_shape, zigzag

ELEMENT_TILE = 64
SAMPLES = 16
SETTLE_PARTS = 8
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Matrix(NamedTuple):
    """One block of one parameter: a contiguous (rows, cols) region `offset` elements in."""

    param: Tensor
    state: dict[str, Any]
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
        self.bind(matrices)
        self.m, self.n = padded_shape(key.rows, key.cols)
        self._groups = list({id(m.group): m.group for m in self.matrices}.values())
        self._found: tuple[list[int], ...] = ()
        self._options: list[tuple[Any, ...]] | None = None
        self._even = False
        batch, device = len(self.matrices), key.device
        self.addresses = DeviceTable(3 * batch, torch.int64, device)
        self.hyper = DeviceTable(4 * batch, torch.float32, device)
        self._own_combined = torch.zeros(batch, 4, dtype=torch.float32, device=device)
        self.combined = self._own_combined
        shapes = [[matrix.rows, matrix.cols] for matrix in self.matrices]
        self.shapes = torch.tensor(shapes, dtype=torch.int32, device=device)
        self.tiles_n = self.n // ELEMENT_TILE
        self.tiles = self.tiles_n * (self.m // ELEMENT_TILE)
        # to skip a matrix its norm must be known before its momentum is written
        self.sampled = self.tiles if key.skip else min(SAMPLES, self.tiles)
        self.samples = torch.zeros(batch * self.sampled, dtype=torch.float64, device=device)
        self.partial = torch.zeros(batch * self.tiles, dtype=torch.float64, device=device)
        self.norms = torch.zeros(batch, dtype=torch.float64, device=device)
        self.factors = torch.zeros(batch, dtype=torch.float32, device=device)
        # no padding: every tile lies inside its matrix and needs no mask
        self.whole = (key.rows, key.cols) == (self.m, self.n)

    def bind(self, matrices: Sequence[Matrix]) -> None:
        """Takes other tensors of the same shapes and groups."""
        self.matrices = list(matrices)
        self._params = [matrix.param for matrix in self.matrices]
        self._states = [matrix.state for matrix in self.matrices]

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
        sources = (addresses[:batch], addresses[batch : 2 * batch], self.shapes, hyper)
        access = {
            "TILE": ELEMENT_TILE,
            "GRAD": _TL[key.grad_dtype],
            "NESTEROV": key.nesterov,
            "EVEN": even,
            "enable_fp_fusion": True,  # stated: the default is about to change, and bits with it
        }
        sampled_pow2 = triton.next_power_of_2(self.sampled)
        kernels.sample_kernel[(batch * self.sampled,)](
            *sources, self.samples, self.tiles_n, self.tiles, self.sampled, **access
        )
        kernels.gather_kernel[(batch * self.tiles,)](
            *sources,
            x_BMN,
            self.samples,
            self.partial,
            self.m,
            self.n,
            self.tiles_n,
            self.tiles,
            self.sampled,
            SAMPLES_POW2=sampled_pow2,
            SKIP=key.skip,
            **access,
        )
        kernels.settle_kernel[(batch * SETTLE_PARTS,)](
            *sources,
            x_BMN,
            self.samples,
            self.partial,
            self.norms,
            self.factors,
            self.m,
            self.n,
            self.tiles_n,
            self.tiles,
            self.sampled,
            SETTLE_PARTS,
            SAMPLES_POW2=sampled_pow2,
            TILES_POW2=triton.next_power_of_2(self.tiles),
            SKIP=key.skip,
            **access,
        )
        turns = zigzag()
        x_BMN = share(
            lambda x, factors: newton_schulz(x, factors, key.quintics, turns), x_BMN, self.factors
        )
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
            next(turns),
            TILE=ELEMENT_TILE,
            PARAM=_TL[key.param_dtype],
            CAUTIOUS=key.cautious,
            SKIP=key.skip,
            EVEN=even,
            enable_fp_fusion=True,
        )

    def _addresses(self) -> bool:
        grads = [p.grad for p in self._params]
        if not all(g.is_contiguous() for g in grads):  # type: ignore[union-attr]
            grads = self._kept = [g.contiguous() for g in grads]  # type: ignore[union-attr]
        found = (
            [g.data_ptr() for g in grads],  # type: ignore[union-attr]
            [state["momentum_buffer"].data_ptr() for state in self._states],
            [p.data_ptr() for p in self._params],
        )
        if found != self._found:
            if found[1:] != self._found[1:]:
                self._check_devices()
            self._found = found
            sizes = (self.key.grad_dtype.itemsize, 4, self.key.param_dtype.itemsize)
            values = [
                address + matrix.offset * size
                for addresses, size in zip(found, sizes, strict=True)
                for address, matrix in zip(addresses, self.matrices, strict=True)
            ]
            self.addresses.set(values)
            self._even = self.whole and all(address % 16 == 0 for address in values)
        return self._even

    def _check_devices(self) -> None:
        """The kernels read addresses: one of another device would be read as one of this."""
        for param, state in zip(self._params, self._states, strict=True):
            tensors = {"parameter": param, "momentum": state["momentum_buffer"]}
            if param.grad is not None:
                tensors["gradient"] = param.grad
            for what, tensor in tensors.items():
                if tensor.device != self.key.device:
                    raise ValueError(
                        f"the {what} of shape {tuple(param.shape)!r} is on {tensor.device}, what "
                        f"belongs to it on {self.key.device}; after moving a model between steps "
                        "call `optimizer.load_state_dict(optimizer.state_dict())`"
                    )

    def _hyper(self) -> None:
        options = [
            (group["lr"], group["momentum"], group["maximize"], group["weight_decay"])
            for group in self._groups
        ]
        if any(isinstance(lr, Tensor) for lr, *_ in options):
            self._options = None  # a tensor's value may change in place
        elif options == self._options:
            return
        else:
            self._options = options
        values: list[float] = []
        live = False
        for matrix in self.matrices:
            group = matrix.group
            lr = group["lr"]
            if isinstance(lr, Tensor):
                live = live or lr.is_cuda
                lr = 0.0 if lr.is_cuda else float(lr)
            values += [
                1.0 - group["momentum"],
                -1.0 if group["maximize"] else 1.0,
                1.0 - lr * group["weight_decay"],
                lr * matrix.ratio,
            ]
        if live:
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


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class KernelPlan:
    """All classes of one step, launched one after the other, or each replayed as a CUDA graph.

    The graphs run on streams of their own: the classes are independent, so one's products hide
    another's memory traffic and the tails of its launches. They are captured on the third step;
    the kernels find gradients and hyper-parameters through tables uploaded before.
    """

    def __init__(self, classes: Sequence[KernelClass], graph: bool) -> None:
        # largest first: the small ones fill its gaps
        self.classes = sorted(classes, key=lambda c: -c.m * c.n * len(c.matrices))
        self.graph = graph
        self._graphs: dict[tuple[int, bool, int], torch.cuda.CUDAGraph] = {}
        self._streams: list[torch.cuda.Stream] = []
        self._steps = 0

    def step(self, share: Share, shared: bool) -> None:
        """One step; `shared` says that `share` communicates, which is not captured here."""
        self._steps += 1
        replay = self._replayable(shared)
        if replay and not self._streams:
            # the first class is the longest chain of launches
            priorities = [-1] + [0] * (len(self.classes) - 1)
            device = self.classes[0].key.device
            self._streams = [torch.cuda.Stream(device, priority=p) for p in priorities]  # type: ignore[no-untyped-call]
        for i, kernel_class in enumerate(self.classes):
            with on_device(kernel_class.key.device):
                even = kernel_class.prepare()
                if replay:
                    self._replay(i, kernel_class, even, share)
                else:
                    kernel_class.launch(even, share)
        if replay:
            main = torch.cuda.current_stream(self.classes[0].key.device)
            for stream in self._streams:
                main.wait_stream(stream)

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

    def _replay(self, i: int, kernel_class: KernelClass, even: bool, share: Share) -> None:
        key = (i, even, kernel_class.combined.data_ptr())
        if key not in self._graphs:
            graph = self._graphs[key] = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                kernel_class.launch(even, share)
        stream = self._streams[i]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._graphs[key].replay()
