"""Batched matrix products and Newton–Schulz on padded 16-bit workspaces, by the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from matilda_optim import triton_kernels as kernels
from matilda_optim.coefficients import Quintic


class ProductConfig(NamedTuple):
    """Tile sizes of a matrix product: rows, columns, depth, warps, pipeline stages."""

    tile_m: int
    tile_n: int
    block_k: int
    warps: int
    stages: int


def symmetric_config(rows: int) -> ProductConfig:
    """Fixed by the padded row count, never by the batch: the same bits in any composition."""
    return ProductConfig(128, 128, 64, 4, 3) if rows > 64 else ProductConfig(64, 64, 64, 4, 4)


def apply_config(rows: int, cols: int) -> ProductConfig:
    """Likewise, of the dense product."""
    if rows > 64 and cols % 256 == 0:
        return ProductConfig(128, 256, 64, 8, 4)
    return ProductConfig(128, 128, 64, 4, 4) if rows > 64 else ProductConfig(64, 128, 64, 4, 4)


def padded_shape(rows: int, cols: int) -> tuple[int, int]:
    """Whole tiles: rows to 64 or a multiple of 128, columns to a multiple of 128."""
    return (64 if rows <= 64 else -(-rows // 128) * 128), -(-cols // 128) * 128


def zigzag() -> Iterator[int]:
    """Directions of successive launches through the batch: 1 is backward, 0 forward.

    A launch begins with the matrices that the one before wrote last: they are still in L2.
    """
    return cycle((1, 0))


def newton_schulz(
    x_BMN: Tensor, factors_B: Tensor, quintics: Sequence[Quintic], turns: Iterator[int]
) -> Tensor:
    """The quintics on padded matrices that have norm 1 once multiplied by their factor.

    The first products apply the factors. `turns` gives each launch its direction.

    Matrices with N ≥ 2·M take the Gram form, whose products are M × M. In 16 bits a Gram matrix
    resolves σ only down to about 1 % of σ₁, so it is formed anew once two steps have lifted the
    small ones, and then every three: as exact as the direct form, at half its work for N = 4·M.
    Square matrices gain nothing from it and lose digits, so they take the direct form.
    """
    _, m, n = x_BMN.shape
    return (_gram_form if n >= 2 * m else _direct_form)(x_BMN, factors_B, quintics, turns)


def _direct_form(
    x_BMN: Tensor, factors_B: Tensor | None, quintics: Sequence[Quintic], turns: Iterator[int]
) -> Tensor:
    for a, b, c in quintics:
        r_BMM = symmetric(x_BMN, x_BMN, next(turns), factors_B)
        h_BMM = symmetric(r_BMM, r_BMM, next(turns), alpha=c, addend=r_BMM, beta=b, gamma=a)
        x_BMN = apply(h_BMM, x_BMN, next(turns), factors_B)
        factors_B = None
    return x_BMN


def _gram_form(
    x_BMN: Tensor, factors_B: Tensor | None, quintics: Sequence[Quintic], turns: Iterator[int]
) -> Tensor:
    start = 0
    while start < len(quintics):
        phase = quintics[start : start + (2 if start == 0 else 3)]
        start += len(phase)
        r_BMM = symmetric(x_BMN, x_BMN, next(turns), factors_B)
        q_BMM: Tensor | None = None
        for i, (a, b, c) in enumerate(phase):
            h_BMM = symmetric(r_BMM, r_BMM, next(turns), alpha=c, addend=r_BMM, beta=b, gamma=a)
            if i + 1 < len(phase):
                r_BMM = symmetric(h_BMM, r_BMM, next(turns))
                r_BMM = symmetric(r_BMM, h_BMM, next(turns))
            q_BMM = h_BMM if q_BMM is None else symmetric(h_BMM, q_BMM, next(turns))
        assert q_BMM is not None
        x_BMN = apply(q_BMM, x_BMN, next(turns), factors_B)
        factors_B = None
    return x_BMN


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(x: Tensor, rows: int, cols: int) -> Any:
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, cols])


def symmetric(
    a: Tensor,
    b: Tensor,
    backward: int = 0,
    factors_B: Tensor | None = None,
    *,
    alpha: float = 1.0,
    addend: Tensor | None = None,
    beta: float = 0.0,
    gamma: float = 0.0,
    config: ProductConfig | None = None,
) -> Tensor:
    """A·Bᵀ, or alpha·A·Bᵀ + beta·addend + gamma·I, (B, M, M), where that is symmetric.

    With factors, A and B are multiplied by theirs.
    """
    batch, m, k = a.shape
    config = config or symmetric_config(m)
    out = torch.empty(batch, m, m, dtype=a.dtype, device=a.device)
    tiles = m // config.tile_m
    kernels.symmetric_kernel[(batch * tiles * (tiles + 1) // 2,)](
        _descriptor(a, config.tile_m, config.block_k),
        _descriptor(b, config.tile_m, config.block_k),
        _descriptor(out if addend is None else addend, config.tile_m, config.tile_m),
        _descriptor(out, config.tile_m, config.tile_m),
        factors_B,
        alpha,
        beta,
        gamma,
        m,
        k,
        tiles,
        backward,
        ADD=addend is not None,
        SCALED=factors_B is not None,
        TILE=config.tile_m,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return out


def apply(
    q: Tensor,
    x: Tensor,
    backward: int = 0,
    factors_B: Tensor | None = None,
    *,
    config: ProductConfig | None = None,
) -> Tensor:
    """Q·X, (B, M, N), times the factors if given."""
    batch, m, n = x.shape
    config = config or apply_config(m, n)
    out = torch.empty_like(x)
    halves = config.tile_n >= 256
    tiles_m, tiles_n = m // config.tile_m, n // config.tile_n
    total = batch * tiles_m * tiles_n
    programs = _multiprocessors(x.device) * (1 if config.warps > 4 else 2)
    kernels.apply_kernel[(min(programs, total),)](
        _descriptor(q, config.tile_m, config.block_k),
        _descriptor(x, config.block_k, config.tile_n),
        _descriptor(out, config.tile_m, config.tile_n // (2 if halves else 1)),
        factors_B,
        m,
        tiles_m,
        tiles_n,
        total,
        backward,
        HALVES=halves,
        SCALED=factors_B is not None,
        PROGRAMS=programs,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return out
