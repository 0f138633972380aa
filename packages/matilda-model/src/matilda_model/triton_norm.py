"""Triton: RMSNorm's backward pass and the residual stream's gradient in one pass.

A block's norm reads the residual stream, which also goes on past it, so its input gets two
gradients. Each program takes rows in turn, adds both, and keeps its sum for the norm's weight in
registers. The forward pass stays torch's: the compiler fuses it with what comes before. Importing
this module needs triton.

Shape suffixes: N rows, D model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor

from matilda_model.second_derivative import refuse_second_derivative

_ROWS = 1
_COLUMNS_PER_WARP = 1024  # one warp a row up to there: its sums need no barrier
_PROGRAMS_PER_SM = 12


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,  # [N, D]
    dpast_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # f32 [D]
    dx_ptr,  # [N, D]
    dweight_ptr,  # f32 [programs, D]: partial sums
    n_rows,
    eps,
    n_programs,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    is_column = column < D
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), n_programs):
        row = (block * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
        inside = is_column & (row < n_rows)
        at = row * D + column
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dpast = tl.load(dpast_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scaled = dy * weight
        square, dot = tl.sum(x * x, 1), tl.sum(scaled * x, 1)
        rstd = tl.rsqrt(square / D + eps)
        along = (rstd * rstd * dot / D)[:, None]
        rstd = rstd[:, None]
        total += dy * (x * rstd)
        dx = dpast + rstd * (scaled - x * along)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    out = dweight_ptr + tl.program_id(0) * D + tl.arange(0, BLOCK)
    tl.store(out, tl.sum(total, 0), mask=tl.arange(0, BLOCK) < D)


@torch.library.custom_op("matilda_model::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    dy_ND: Tensor, dpast_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `x_ND`, to which `dpast_ND` is added, and of the float32 `weight_D`."""
    n_rows, dim = x_ND.shape
    block = triton.next_power_of_2(dim)
    dy_ND, dpast_ND, x_ND = dy_ND.contiguous(), dpast_ND.contiguous(), x_ND.contiguous()
    dx_ND = torch.empty_like(x_ND)
    programs = _PROGRAMS_PER_SM
    if x_ND.device.type == "cuda":
        programs *= torch.cuda.get_device_properties(x_ND.device).multi_processor_count
    programs = max(1, min(programs, triton.cdiv(n_rows, _ROWS)))
    dweight = torch.empty(programs, dim, dtype=torch.float32, device=x_ND.device)
    _backward_kernel[(programs,)](
        dy_ND,
        dpast_ND,
        x_ND,
        weight_D,
        dx_ND,
        dweight,
        n_rows,
        eps,
        programs,
        D=dim,
        BLOCK=block,
        ROWS=_ROWS,
        num_warps=max(1, block // _COLUMNS_PER_WARP),
    )
    return dx_ND, dweight.sum(0)


@rms_norm_backward.register_fake
def _(
    dy_ND: Tensor, dpast_ND: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format), torch.empty_like(weight_D)


class BranchingRMSNorm(torch.autograd.Function):
    """The norm of `x` over the last dimension, and `x` itself for what goes on past it."""

    @staticmethod
    def forward(ctx, x, weight_D, eps):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return F.rms_norm(x.float(), weight_D.shape, weight_D, eps).to(x.dtype), x

    @staticmethod
    def backward(ctx, dy, dpast):  # type: ignore[no-untyped-def]
        refuse_second_derivative()
        x, weight_D = ctx.saved_tensors
        rows = (d.flatten(0, -2) for d in (dy, dpast, x))
        dx_ND, dweight_D = rms_norm_backward(*rows, weight_D, ctx.eps)
        return dx_ND.view(x.shape), dweight_D, None
