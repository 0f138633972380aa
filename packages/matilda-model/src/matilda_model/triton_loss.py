"""Triton: soft-cap, cross-entropy, z-loss and their gradient in one kernel over bf16 logits.

The head's matmul stays cuBLAS. Rows go through it in chunks, each chunk's logits are read from
memory once and overwritten by their gradient, and the gradient's two matmuls follow at once, so
neither float32 logits nor all logits ever exist. Importing this module needs triton.

Shape suffixes: N tokens, D model, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK_ROWS = 16384  # 1.6 GB of bf16 logits at 50304; the matmuls are no faster with more rows
_BLOCK = 4096
_WARPS = 32
_LOG2E = tl.constexpr(1.4426950408889634)
_BOUND = 64.0  # exp(±64) * vocabulary fits float32, so a smaller soft-cap needs no running maximum


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """Eigen's rational tanh: one slow instruction (the division) instead of two; error 4e-7."""
    x = tl.maximum(x, -7.90531110763549805, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, 7.90531110763549805, propagate_nan=tl.PropagateNan.ALL)
    s = x * x
    p = -2.76076847742355e-16 * s + 2.00018790482477e-13
    p = p * s - 8.60467152213735e-11
    p = p * s + 5.12229709037114e-08
    p = p * s + 1.48572235717979e-05
    p = p * s + 6.37261928875436e-04
    p = p * s + 4.89352455891786e-03
    q = 1.19825839466702e-06 * s + 1.18534705686654e-04
    q = q * s + 2.26843463243900e-03
    q = q * s + 4.89352518554385e-03
    return x * p / q


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # bf16/f32 [n_rows, stride_row]; overwritten by the gradient when WITH_GRAD
    targets_ptr,  # int64 [n_rows]; negative: ignored
    ce_ptr,  # f32 [n_rows]
    z_ptr,  # f32 [n_rows]
    count_ptr,  # f32 scalar: tokens in the mean
    n_cols,
    stride_row,
    softcap,
    z_loss,
    HAS_CAP: tl.constexpr,
    BOUNDED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    if target < 0:
        tl.store(ce_ptr + row, 0.0)
        tl.store(z_ptr + row, 0.0)
        if WITH_GRAD:
            for start in range(0, n_cols, BLOCK):
                zero = tl.zeros([BLOCK], dtype=logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + start + cols, zero, mask=start + cols < n_cols)
        return

    # all in base 2
    slope = 1.0 / softcap
    scale = softcap * _LOG2E
    x_target = tl.load(logits_ptr + target).to(tl.float32)
    z_target = scale * _tanh(x_target * slope) if HAS_CAP else x_target * _LOG2E

    total = tl.zeros([BLOCK], dtype=tl.float32)
    peak = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, n_cols, BLOCK):
        inside = start + cols < n_cols
        x = tl.load(logits_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
        z = scale * _tanh(x * slope) if HAS_CAP else x * _LOG2E
        if BOUNDED:
            total += tl.where(inside, tl.exp2(z), 0.0)
        else:
            # each lane keeps its own maximum, finite from its first column on
            z = tl.where(inside, z, float("-inf"))
            new_peak = tl.maximum(peak, z)
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.exp2(peak - safe) + tl.exp2(z - safe)
            peak = new_peak
    if BOUNDED:
        lse = tl.log2(tl.sum(total, 0))
    else:
        top = tl.max(peak, 0)
        lse = top + tl.log2(tl.sum(total * tl.exp2(peak - top), 0))

    lse_e = lse / _LOG2E
    tl.store(ce_ptr + row, (lse - z_target) / _LOG2E)
    tl.store(z_ptr + row, z_loss * lse_e * lse_e)
    if WITH_GRAD:
        weight = 1.0 / tl.load(count_ptr)
        weight_p = weight * (1.0 + 2.0 * z_loss * lse_e)
        for start in range(0, n_cols, BLOCK):
            inside = start + cols < n_cols
            # second read of the row: it is still in L2
            x = tl.load(logits_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
            if HAS_CAP:
                tanh = _tanh(x * slope)
                p = tl.exp2(scale * tanh - lse)
            else:
                p = tl.exp2(x * _LOG2E - lse)
            grad = p * weight_p - tl.where(start + cols == target, weight, 0.0)
            if HAS_CAP:
                grad *= 1.0 - tanh * tanh
            tl.store(
                logits_ptr + start + cols,
                grad.to(logits_ptr.dtype.element_ty),
                mask=inside,
            )


def cross_entropy_(
    logits_NV: Tensor,
    targets_N: Tensor,
    count: Tensor,
    *,
    softcap: float | None,
    z_loss: float,
    with_grad: bool,
    block: int = _BLOCK,
    warps: int = _WARPS,
) -> tuple[Tensor, Tensor]:
    """Per-token cross-entropy and z-loss, float32 [N]; `logits_NV` becomes its gradient in place.

    The gradient is that of the sum of both over `count` (a float32 scalar on the device). Rows
    with a negative target cost and contribute nothing.
    """
    n_rows, n_cols = logits_NV.shape
    ce_N = torch.empty(n_rows, dtype=torch.float32, device=logits_NV.device)
    z_N = torch.empty_like(ce_N)
    _cross_entropy_kernel[(n_rows,)](
        logits_NV,
        targets_N,
        ce_N,
        z_N,
        count,
        n_cols,
        logits_NV.stride(0),
        1.0 if softcap is None else softcap,
        z_loss,
        HAS_CAP=softcap is not None,
        BOUNDED=softcap is not None and softcap <= _BOUND,
        WITH_GRAD=with_grad,
        BLOCK=block,
        num_warps=warps,
    )
    return ce_N, z_N


@torch.library.custom_op("matilda_model::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    h_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    softcap: float | None,
    z_loss: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean cross-entropy, mean z-loss, and their sum's gradients for `h` (its dtype) and `w` (f32).

    The gradients are empty without `with_grad`. `w_VD` has the dtype of `h_ND`.
    """
    valid = targets_N >= 0
    count = valid.sum().clamp_min(1).float()
    dh_ND = torch.empty_like(h_ND) if with_grad else h_ND.new_empty(0)
    dw_VD = w_VD.new_empty(w_VD.shape if with_grad else (0,), dtype=torch.float32)
    ce, zl = [], []
    for start in range(0, h_ND.shape[0], _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        h = h_ND[rows]
        logits = h @ w_VD.T
        ce_N, z_N = cross_entropy_(
            logits, targets_N[rows], count, softcap=softcap, z_loss=z_loss, with_grad=with_grad
        )
        ce.append(ce_N)
        zl.append(z_N)
        if with_grad:
            torch.mm(logits, w_VD, out=dh_ND[rows])
            _add_weight_gradient(dw_VD, logits, h, first=start == 0)
        del logits  # the next chunk takes its memory
    return torch.cat(ce).sum() / count, torch.cat(zl).sum() / count, dh_ND, dw_VD


def _add_weight_gradient(dw_VD: Tensor, dlogits: Tensor, h: Tensor, *, first: bool) -> None:
    """`dw += dlogits.T @ h` with a float32 sum and no bf16 rounding between chunks."""
    if h.dtype == torch.float32 or h.device.type != "cuda":
        product = (dlogits.T @ h).float()
        dw_VD.copy_(product) if first else dw_VD.add_(product)
    elif first:
        torch.mm(dlogits.T, h, out_dtype=torch.float32, out=dw_VD)
    else:
        torch.addmm(dw_VD, dlogits.T, h, out_dtype=torch.float32, out=dw_VD)


@linear_cross_entropy_op.register_fake
def _(
    h_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    softcap: float | None,
    z_loss: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalar = h_ND.new_empty((), dtype=torch.float32)
    dh_ND = torch.empty_like(h_ND) if with_grad else h_ND.new_empty(0)
    dw_VD = w_VD.new_empty(w_VD.shape if with_grad else (0,), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), dh_ND, dw_VD
