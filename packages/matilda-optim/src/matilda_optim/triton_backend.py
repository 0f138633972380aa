"""The CUDA back end: batches of matrices through `triton_kernels`, with no host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from matilda_optim import triton_kernels as kernels
from matilda_optim.coefficients import Quintic
from matilda_optim.reference import Share

ELEMENT_TILE = 64
GATHER_LAG = 192
_TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_RING = 4


class ProductConfig(NamedTuple):
    """Tile sizes of a matrix product: rows, columns, depth, warps, pipeline stages."""

    tile_m: int
    tile_n: int
    block_k: int
    warps: int
    stages: int


class ChainConfig(NamedTuple):
    """Tile, depth, warps, stages, matrices in flight together, operands by bulk copy or loads."""

    tile: int
    block_k: int
    warps: int
    stages: int
    group: int
    bulk: bool


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


def symmetric_config(rows: int) -> ProductConfig:
    """Fixed by the padded row count, never by the batch: the same bits in any composition."""
    return ProductConfig(128, 128, 64, 4, 4) if rows > 64 else ProductConfig(64, 64, 64, 4, 4)


def chain_config(rows: int) -> ChainConfig:
    """Likewise; `group` sets the order of work only."""
    return ChainConfig(128 if rows > 64 else 64, 64, 4, 3, max(1, 12 * 768**2 // rows**2), True)


def apply_config(rows: int, cols: int) -> ProductConfig:
    """Likewise, of the dense product."""
    if rows > 64 and cols % 256 == 0:
        return ProductConfig(128, 256, 64, 8, 3)
    return ProductConfig(128, 128, 64, 4, 4) if rows > 64 else ProductConfig(64, 128, 64, 4, 4)


def padded_shape(rows: int, cols: int) -> tuple[int, int]:
    """Whole tiles: rows to 64 or a multiple of 128, columns to a multiple of 128."""
    return (64 if rows <= 64 else -(-rows // 128) * 128), -(-cols // 128) * 128


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

    def forget(self) -> None:
        """Makes the next `set` upload, after the device array was overwritten by other means."""
        self._values = None


class KernelClass:
    """The static part of one batch: shapes and tables for its matrices."""

    def __init__(self, key: KernelKey, matrices: Sequence[Matrix]) -> None:
        self.key = key
        self.matrices = list(matrices)
        self.m, self.n = padded_shape(key.rows, key.cols)
        batch, device = len(self.matrices), key.device
        self.phases = gram_phases(key.quintics, device)
        self.addresses = DeviceTable(3 * batch, torch.int64, device)
        self.hyper = DeviceTable(4 * batch, torch.float32, device)
        shapes = [[matrix.rows, matrix.cols] for matrix in self.matrices]
        self.shapes = torch.tensor(shapes, dtype=torch.int32, device=device)
        self.counters = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        self.norms = torch.zeros(batch, dtype=torch.float64, device=device)
        self.tiles_n = self.n // ELEMENT_TILE
        self.tiles = self.tiles_n * (self.m // ELEMENT_TILE)
        # no padding: every tile lies inside its matrix and needs no mask
        self.whole = (key.rows, key.cols) == (self.m, self.n)

    def step(self, share: Share) -> None:
        """Momentum, orthogonalisation and update of every matrix of the class."""
        key, batch = self.key, len(self.matrices)
        addresses, even = self._addresses()
        hyper = self._hyper()
        x_BMN = torch.empty(batch, self.m, self.n, dtype=key.ns_dtype, device=key.device)
        partial = torch.empty(batch * self.tiles, dtype=torch.float64, device=key.device)
        kernels.gather_kernel[(2 * ((batch + 1) * self.tiles + GATHER_LAG),)](
            addresses[:batch],
            addresses[batch : 2 * batch],
            self.shapes,
            hyper,
            x_BMN,
            partial,
            self.counters,
            self.norms,
            batch,
            GATHER_LAG,
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
        )
        x_BMN = share(x_BMN, lambda x: newton_schulz(x, self.phases))
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
        )

    def _addresses(self) -> tuple[Tensor, bool]:
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
        even = self.whole and all(address % 16 == 0 for address in values)
        return self.addresses.set(values), even

    def _hyper(self) -> Tensor:
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
            return self._device_hyper(values)
        return self.hyper.set(values).view(-1, 4)

    def _device_hyper(self, values: list[float]) -> Tensor:
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
        return torch.stack([table[:, 0], table[:, 1], keep, rates * table[:, 3]], dim=1)


class Phase(NamedTuple):
    """Symmetric products from one Gram matrix to the polynomial Q of several steps."""

    program: Tensor
    weights: Tensor
    ops: int
    result: int


SLOTS = 4


def gram_phases(quintics: Sequence[Quintic], device: torch.device) -> list[Phase]:
    """The products of the Gram form, restarted after two steps and then every three.

    In 16 bits a Gram matrix resolves σ only down to about 1 % of σ₁. Forming it anew, once two
    steps have lifted the small ones, makes the result as exact as the direct iteration.
    """
    phases = []
    start = 0
    while start < len(quintics):
        part = quintics[start : start + (2 if start == 0 else 3)]
        start += len(part)
        program, weights, result = _products(part)
        phases.append(
            Phase(
                torch.tensor(program, dtype=torch.int32, device=device),
                torch.tensor(weights, dtype=torch.float32, device=device),
                len(program),
                result,
            )
        )
    return phases


def _products(
    quintics: Sequence[Quintic],
) -> tuple[list[tuple[int, int, int, int]], list[tuple[float, float, float]], int]:
    """(a, b, out, add) and (alpha, beta, gamma) of each product; R is slot 0 throughout."""
    program: list[tuple[int, int, int, int]] = []
    weights: list[tuple[float, float, float]] = []
    free = list(range(1, SLOTS))
    q = -1
    for i, (a, b, c) in enumerate(quintics):
        h = free.pop()
        program.append((0, 0, h, 1))
        weights.append((c, b, a))
        old = q
        if q < 0:
            q = h
        else:
            q = free.pop()
            program.append((h, old, q, 0))
            weights.append((1.0, 0.0, 0.0))
            free.append(old)
        if i + 1 < len(quintics):
            t = free.pop()
            program += [(h, 0, t, 0), (t, h, 0, 0)]
            weights += [(1.0, 0.0, 0.0)] * 2
            free.append(t)
        if q != h:
            free.append(h)
    return program, weights, q


def newton_schulz(x_BMN: Tensor, phases: Sequence[Phase]) -> Tensor:
    """The quintics behind `phases` on padded, normalised matrices."""
    batch, m, _ = x_BMN.shape
    work = torch.empty(SLOTS, batch, m, m, dtype=x_BMN.dtype, device=x_BMN.device)
    for phase in phases:
        symmetric(x_BMN, x_BMN, out=work[0])
        chain(work, phase)
        x_BMN = apply(work[phase.result], x_BMN)
    return x_BMN


def chain(work: Tensor, phase: Phase, *, config: ChainConfig | None = None) -> None:
    """Runs the products of `phase` in `work`, (SLOTS, B, M, M)."""
    batch, m = work.shape[1:3]
    config = config or chain_config(m)
    tiles = m // config.tile
    progress = torch.zeros(batch, phase.ops, dtype=torch.int32, device=work.device)
    kernels.chain_kernel[(batch * phase.ops * tiles * (tiles + 1) // 2,)](
        _descriptor(work, config.tile, config.block_k),
        work,
        phase.program,
        phase.weights,
        progress,
        batch,
        m,
        phase.ops,
        tiles,
        config.group,
        TILE=config.tile,
        BLOCK_K=config.block_k,
        BULK=config.bulk,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _descriptor(x: Tensor, rows: int, cols: int) -> Any:
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, cols])


def symmetric(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    addend: Tensor | None = None,
    beta: float = 0.0,
    gamma: float = 0.0,
    out: Tensor | None = None,
    config: ProductConfig | None = None,
) -> Tensor:
    """alpha·A·Bᵀ + beta·addend + gamma·I, (B, M, M), where the result is known to be symmetric."""
    batch, m, k = a.shape
    config = config or symmetric_config(m)
    if out is None:
        out = torch.empty(batch, m, m, dtype=a.dtype, device=a.device)
    tiles = m // config.tile_m
    kernels.symmetric_kernel[(batch * tiles * (tiles + 1) // 2,)](
        _descriptor(a, config.tile_m, config.block_k),
        _descriptor(b, config.tile_m, config.block_k),
        out if addend is None else addend,
        out,
        alpha,
        beta,
        gamma,
        m,
        k,
        tiles,
        ADD=addend is not None,
        TILE=config.tile_m,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def apply(q: Tensor, x: Tensor, *, config: ProductConfig | None = None) -> Tensor:
    """Q·X, (B, M, N)."""
    batch, m, n = x.shape
    config = config or apply_config(m, n)
    out = torch.empty_like(x)
    tiles_m, tiles_n = m // config.tile_m, n // config.tile_n
    kernels.apply_kernel[(batch * tiles_m * tiles_n,)](
        _descriptor(q, config.tile_m, config.block_k),
        _descriptor(x, config.block_k, config.tile_n),
        _descriptor(out, config.tile_m, config.tile_n),
        m,
        tiles_m,
        tiles_n,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
