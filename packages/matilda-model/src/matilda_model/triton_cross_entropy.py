"""Triton: soft-cap, cross-entropy, z-loss and their gradient in one kernel over bf16 logits.

Logits are read from memory once and overwritten by their gradient; a row's second reading finds it
in L2, or its tanh in registers. Importing this module needs triton.

Shape suffixes: N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 32
_SHARED = 4  # logits that share a reciprocal
_KEPT_BLOCK = 8192
_KEPT_BLOCKS = 7  # so many to a row, and its threads' registers hold it
_LOG2E = tl.constexpr(1.4426950408889634)
E5M2_SCALE = tl.constexpr(2.0**12)  # the largest gradients, about 1, leave room for a z-loss
_BOUND = 64.0  # exp(±64) * vocabulary fits float32, so a smaller soft-cap needs no running maximum


@triton.jit  # type: ignore[untyped-decorator]
def _exp2(x, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    if FAST:  # without the scaling for denormals: results under 1e-38 become 0
        x = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        x = tl.exp2(x)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _reciprocal(x, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    if FAST:  # one instruction and 1 ulp; the plain division expands to eight
        x = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        x = 1.0 / x
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _half_fall(x, FAST: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr):  # type: ignore[no-untyped-def]
    """`(1 - tanh(x * ln 2 / 2)) / 2` = 1 / (1 + 2 ** x); SHARED (1, 2, 4) share a reciprocal.

    1 / a = b / (a b): the special-function unit, which bounds this kernel, gives one reciprocal for
    several elements. Powers stop at 2 ** 30, where 1 - tanh is 0 to float32, so that the product of
    four is finite; a NaN stays one.
    """
    if SHARED == 1:
        u = _reciprocal(1.0 + _exp2(x, FAST), FAST)
    else:
        x = tl.minimum(x, 30.0, propagate_nan=tl.PropagateNan.ALL)
        d = 1.0 + _exp2(x, FAST)
        if SHARED == 2:
            a, b = d.reshape(BLOCK // 2, 2).split()
            r = _reciprocal(a * b, FAST)
            u = tl.join(b * r, a * r).reshape(BLOCK)
        else:
            even, odd = d.reshape(BLOCK // 4, 2, 2).split()
            a, c = even.split()
            b, e = odd.split()
            ab, ce = a * b, c * e
            r = _reciprocal(ab * ce, FAST)
            left, right = ce * r, ab * r
            u = tl.join(tl.join(b * left, e * right), tl.join(a * left, c * right)).reshape(BLOCK)
    return u


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # bf16/f32 [n_rows, stride_row]; overwritten by the gradient when WITH_GRAD
    targets_ptr,  # int64 [n_rows]; negative: ignored
    ce_ptr,  # f32 [n_rows]
    z_ptr,  # f32 [n_rows]
    grad8_ptr,  # e5m2 [n_rows, n_cols]: the gradient but the target's, scaled, when GRAD8
    target_grad_ptr,  # f32 [n_rows], the target's, when GRAD8
    n_cols,
    stride_row,
    softcap,
    z_loss,
    HAS_CAP: tl.constexpr,
    BOUNDED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    GRAD8: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    grad8_ptr += row * n_cols
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    kind = logits_ptr.dtype.element_ty
    if target < 0:
        tl.store(ce_ptr + row, 0.0)
        tl.store(z_ptr + row, 0.0)
        if WITH_GRAD:
            for start in range(0, n_cols, BLOCK):
                zero = tl.zeros([BLOCK], dtype=kind)
                tl.store(logits_ptr + start + cols, zero, mask=start + cols < n_cols)
                if GRAD8:
                    tl.store(
                        grad8_ptr + start + cols, zero.to(tl.float8e5), mask=start + cols < n_cols
                    )
        if GRAD8:
            tl.store(target_grad_ptr + row, 0.0)
        return

    # all in base 2; tanh(x / cap) = 1 - 2 u with u = 1 / (1 + 2 ** (x * slope))
    slope = 2.0 * _LOG2E / softcap
    scale = softcap * _LOG2E
    x_target = tl.load(logits_ptr + target).to(tl.float32)
    u_target = _reciprocal(1.0 + _exp2(x_target * slope, FAST), FAST)
    z_target = scale * (1.0 - 2.0 * u_target) if HAS_CAP else x_target * _LOG2E

    total = tl.zeros([BLOCK], dtype=tl.float32)
    peak = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, n_cols, BLOCK):
        inside = start + cols < n_cols
        x = tl.load(logits_ptr + start + cols, mask=inside, other=float("-inf")).to(tl.float32)
        if HAS_CAP:
            u = _half_fall(x * slope, FAST, BLOCK, SHARED)
            z = scale - (2.0 * scale) * u
        else:
            z = x * _LOG2E
        if BOUNDED:
            total += _exp2(z, FAST)
        else:
            # each lane keeps its own maximum, finite from its first column on
            z = tl.where(inside, z, float("-inf"))
            new_peak = tl.maximum(peak, z)
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * _exp2(peak - safe, FAST) + _exp2(z - safe, FAST)
            peak = new_peak
    if BOUNDED:
        # columns past the end were read as -inf, so each added exp(-cap)
        outside = (n_cols + BLOCK - 1) // BLOCK * BLOCK - n_cols
        lse = tl.log2(tl.sum(total, 0) - outside * tl.exp2(-scale))
    else:
        top = tl.max(peak, 0)
        lse = top + tl.log2(tl.sum(total * _exp2(peak - top, FAST), 0))

    lse_e = lse / _LOG2E
    tl.store(ce_ptr + row, (lse - z_target) / _LOG2E)
    tl.store(z_ptr + row, z_loss * lse_e * lse_e)
    if WITH_GRAD:
        weight_p = (4.0 if HAS_CAP else 1.0) * (1.0 + 2.0 * z_loss * lse_e)
        shift = scale - lse
        for start in range(0, n_cols, BLOCK):
            inside = start + cols < n_cols
            # second read of the row: it is still in L2
            x = tl.load(logits_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
            if HAS_CAP:
                u = _half_fall(x * slope, FAST, BLOCK, SHARED)
                # 1 - tanh ** 2 = 4 u (1 - u)
                grad = _exp2(shift - (2.0 * scale) * u, FAST) * (weight_p * (u - u * u))
            else:
                grad = _exp2(x * _LOG2E - lse, FAST) * weight_p
            tl.store(logits_ptr + start + cols, grad.to(kind), mask=inside)
            if GRAD8:
                grad = tl.where(start + cols == target, 0.0, grad * E5M2_SCALE)
                tl.store(grad8_ptr + start + cols, grad.to(tl.float8e5), mask=inside)
        # the target's column, apart, costs the loop nothing; the barrier orders it after the loop
        p_target = tl.exp2(z_target - lse)
        grad_target = p_target * (1.0 + 2.0 * z_loss * lse_e) - 1.0
        if HAS_CAP:
            grad_target *= 4.0 * u_target * (1.0 - u_target)
        tl.debug_barrier()
        tl.store(logits_ptr + target, grad_target.to(kind))
        if GRAD8:
            tl.store(target_grad_ptr + row, grad_target)


@triton.jit  # type: ignore[untyped-decorator]
def _pack(u, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of [0, 1] as 16-bit fixed point, two in an int32: 256 + u has u in its last bits."""
    a, b = (u + 256.0).to(tl.int32, bitcast=True).reshape(BLOCK // 2, 2).split()
    return (b << 16) | (a & 0xFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(pair, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    bits = tl.join(pair & 0xFFFF, (pair >> 16) & 0xFFFF) | 0x43800000  # 256 in float32
    return bits.to(tl.float32, bitcast=True).reshape(BLOCK) - 256.0


@triton.jit  # type: ignore[untyped-decorator]
def _kept_cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # bf16/f32 [n_rows, stride_row]; overwritten by the gradient
    targets_ptr,  # int64 [n_rows]; negative: ignored
    ce_ptr,  # f32 [n_rows]
    z_ptr,  # f32 [n_rows]
    n_cols,
    stride_row,
    softcap,
    z_loss,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # how many hold a row
    SHARED: tl.constexpr,
):
    """`_cross_entropy_kernel` with a bounded soft-cap: the row's tanh stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    kind = logits_ptr.dtype.element_ty
    slope = 2.0 * _LOG2E / softcap
    scale = softcap * _LOG2E
    is_real = target >= 0
    x_target = tl.load(logits_ptr + tl.maximum(target, 0)).to(tl.float32)
    u_target = _reciprocal(1.0 + _exp2(x_target * slope, FAST), FAST)
    z_target = scale * (1.0 - 2.0 * u_target)

    total = tl.zeros([BLOCK], dtype=tl.float32)
    kept = ()
    for i in tl.static_range(BLOCKS):
        inside = i * BLOCK + cols < n_cols
        x = tl.load(logits_ptr + i * BLOCK + cols, mask=inside, other=float("-inf"))
        u = _half_fall(x.to(tl.float32) * slope, FAST, BLOCK, SHARED)
        total += _exp2(scale - (2.0 * scale) * u, FAST)
        kept += (_pack(u, BLOCK),)  # type: ignore[assignment]
    # columns past the end were read as -inf, so each added exp(-cap)
    lse = tl.log2(tl.sum(total, 0) - (BLOCKS * BLOCK - n_cols) * tl.exp2(-scale))
    lse_e = lse / _LOG2E
    tl.store(ce_ptr + row, tl.where(is_real, (lse - z_target) / _LOG2E, 0.0))
    tl.store(z_ptr + row, tl.where(is_real, z_loss * lse_e * lse_e, 0.0))

    # 1 - tanh ** 2 = 4 u (1 - u); both factors go into the exponent, 0 for an ignored row
    weight_p = 1.0 + 2.0 * z_loss * lse_e
    shift = tl.where(is_real, scale - lse + 2.0 + tl.log2(weight_p), float("-inf"))
    for i in tl.static_range(BLOCKS):
        inside = i * BLOCK + cols < n_cols
        u = _unpack(kept[i], BLOCK)
        grad = _exp2(shift - (2.0 * scale) * u, FAST) * (u - u * u)
        tl.store(logits_ptr + i * BLOCK + cols, grad.to(kind), mask=inside)
    p_target = tl.exp2(z_target - lse)
    grad_target = (p_target * weight_p - 1.0) * (4.0 * u_target * (1.0 - u_target))
    tl.debug_barrier()
    tl.store(logits_ptr + target, grad_target.to(kind), mask=is_real)


def cross_entropy_(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    softcap: float | None,
    z_loss: float,
    with_grad: bool,
    grad8: tuple[Tensor, Tensor] | None = None,
    block: int | None = None,
    warps: int = _WARPS,
    shared: int = _SHARED,
    kept: bool = True,
) -> tuple[Tensor, Tensor]:
    """Per-token cross-entropy and z-loss, float32 [N]; `logits_NV` becomes its gradient in place.

    The gradient is that of the sum of both, not of their mean: a target's -1 is exact in bf16,
    where -1 / count is not, and would be off by the same 0.2 % in every row. Rows with a negative
    target cost and contribute nothing.

    `grad8`, e5m2 [N, V] and float32 [N], takes the gradient a second time: scaled, with 0 for the
    target, and the target's own entry. `kept` allows the kernel that computes each tanh once, where
    soft-cap and vocabulary do.
    """
    grad8_NV, target_grad_N = (logits_NV, logits_NV) if grad8 is None else grad8
    n_rows, n_cols = logits_NV.shape
    ce_N = torch.empty(n_rows, dtype=torch.float32, device=logits_NV.device)
    z_N = torch.empty_like(ce_N)
    bounded = softcap is not None and softcap <= _BOUND
    blocks = triton.cdiv(n_cols, block or _KEPT_BLOCK)
    if kept and bounded and with_grad and grad8 is None and blocks <= _KEPT_BLOCKS:
        _kept_cross_entropy_kernel[(n_rows,)](
            logits_NV,
            targets_N,
            ce_N,
            z_N,
            n_cols,
            logits_NV.stride(0),
            softcap,
            z_loss,
            FAST=logits_NV.device.type == "cuda",
            BLOCK=block or _KEPT_BLOCK,
            BLOCKS=blocks,
            SHARED=shared,
            num_warps=warps,
        )
        return ce_N, z_N
    _cross_entropy_kernel[(n_rows,)](
        logits_NV,
        targets_N,
        ce_N,
        z_N,
        grad8_NV,
        target_grad_N,
        n_cols,
        logits_NV.stride(0),
        1.0 if softcap is None else softcap,
        z_loss,
        HAS_CAP=softcap is not None,
        BOUNDED=bounded,
        WITH_GRAD=with_grad,
        GRAD8=grad8 is not None and with_grad,
        FAST=logits_NV.device.type == "cuda",
        BLOCK=block or _BLOCK,
        SHARED=shared,
        num_warps=warps,
    )
    return ce_N, z_N
