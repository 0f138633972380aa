"""Batched matrix products and Newton–Schulz on padded 16-bit workspaces, by the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
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
    return ProductConfig(128, 128, 64, 4, 4) if rows > 64 else ProductConfig(64, 64, 64, 4, 4)


def apply_config(rows: int, cols: int) -> ProductConfig:
    """Likewise, of the dense product."""
    if rows > 64 and cols % 256 == 0:
        return ProductConfig(128, 256, 64, 8, 3)
    return ProductConfig(128, 128, 64, 4, 4) if rows > 64 else ProductConfig(64, 128, 64, 4, 4)


def padded_shape(rows: int, cols: int) -> tuple[int, int]:
    """Whole tiles: rows to 64 or a multiple of 128, columns to a multiple of 128."""
    return (64 if rows <= 64 else -(-rows // 128) * 128), -(-cols // 128) * 128


def newton_schulz(x_BMN: Tensor, quintics: Sequence[Quintic], chunk: int = 0) -> Tensor:
    """The quintics on padded, normalised matrices, `chunk` at a time; 0 is all at once.

    Matrices with N ≥ 2·M take the Gram form, whose products are M × M. In 16 bits a Gram matrix
    resolves σ only down to about 1 % of σ₁, so it is formed anew once two steps have lifted the
    small ones, and then every three: as exact as the direct form, at half its work for N = 4·M.
    Square matrices gain nothing from it and lose digits, so they take the direct form.
    """
    batch, m, n = x_BMN.shape
    form = _gram_form if n >= 2 * m else _direct_form
    if not chunk or chunk >= batch:
        return form(x_BMN, quintics, None)
    out = torch.empty_like(x_BMN)
    for start in range(0, batch, chunk):
        form(x_BMN[start : start + chunk], quintics, out[start : start + chunk])
    return out


def _direct_form(x_BMN: Tensor, quintics: Sequence[Quintic], out: Tensor | None) -> Tensor:
    for i, (a, b, c) in enumerate(quintics):
        r_BMM = symmetric(x_BMN, x_BMN)
        h_BMM = symmetric(r_BMM, r_BMM, alpha=c, addend=r_BMM, beta=b, gamma=a)
        x_BMN = apply(h_BMM, x_BMN, out=out if i + 1 == len(quintics) else None)
    return x_BMN


def _gram_form(x_BMN: Tensor, quintics: Sequence[Quintic], out: Tensor | None) -> Tensor:
    start = 0
    while start < len(quintics):
        phase = quintics[start : start + (2 if start == 0 else 3)]
        start += len(phase)
        r_BMM = symmetric(x_BMN, x_BMN)
        q_BMM: Tensor | None = None
        for i, (a, b, c) in enumerate(phase):
            h_BMM = symmetric(r_BMM, r_BMM, alpha=c, addend=r_BMM, beta=b, gamma=a)
            q_BMM = h_BMM if q_BMM is None else symmetric(h_BMM, q_BMM)
            if i + 1 < len(phase):
                r_BMM = symmetric(symmetric(h_BMM, r_BMM), h_BMM)
        assert q_BMM is not None
        x_BMN = apply(q_BMM, x_BMN, out=out if start >= len(quintics) else None)
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
    *,
    alpha: float = 1.0,
    addend: Tensor | None = None,
    beta: float = 0.0,
    gamma: float = 0.0,
    out: Tensor | None = None,
    config: ProductConfig | None = None,
) -> Tensor:
    """A·Bᵀ, or alpha·A·Bᵀ + beta·addend + gamma·I, (B, M, M), where that is symmetric."""
    batch, m, k = a.shape
    config = config or symmetric_config(m)
    if out is None:
        out = torch.empty(batch, m, m, dtype=a.dtype, device=a.device)
    tiles = m // config.tile_m
    kernels.symmetric_kernel[(batch * tiles * (tiles + 1) // 2,)](
        _descriptor(a, config.tile_m, config.block_k),
        _descriptor(b, config.tile_m, config.block_k),
        _descriptor(out if addend is None else addend, config.tile_m, config.tile_m),
        _descriptor(out, config.tile_m, config.tile_m),
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
        enable_fp_fusion=True,
    )
    return out


def apply(
    q: Tensor, x: Tensor, *, out: Tensor | None = None, config: ProductConfig | None = None
) -> Tensor:
    """Q·X, (B, M, N)."""
    batch, m, n = x.shape
    config = config or apply_config(m, n)
    if out is None:
        out = torch.empty_like(x)
    tiles_m, tiles_n = m // config.tile_m, n // config.tile_n
    total = batch * tiles_m * tiles_n
    programs = _multiprocessors(x.device) * (1 if config.warps > 4 else 2)
    kernels.apply_kernel[(min(programs, total),)](
        _descriptor(q, config.tile_m, config.block_k),
        _descriptor(x, config.block_k, config.tile_n),
        _descriptor(out, config.tile_m, config.tile_n),
        m,
        tiles_m,
        tiles_n,
        total,
        PROGRAMS=programs,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        BLOCK_K=config.block_k,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return out
