"""Triton: soft-cap, cross-entropy, z-loss and their gradient in one kernel over bf16 logits.

The head's matmuls stay cuBLAS, but the logits' may be quack's. Rows go through it in chunks, each
chunk's logits are read from memory once and overwritten by their gradient, and the gradient's two
matmuls follow at once, so neither float32 logits nor all logits ever exist. Importing this module
needs triton.

With the head `"fp8"` its product and its gradient for `h` multiply in 8 bits (Hopper or later).
Hidden states and weights are e4m3 with one scale a tensor. Of the logits' gradient the
probabilities are e5m2, whose range they need, and the target's entry, nearly -1 in every row, is
kept out and added in bf16: rounded to 8 bits it would be off in the same direction in all of them.
The weights' gradient stays bf16.

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
_SHARED = 4  # logits that share a reciprocal
_KEPT_BLOCK = 8192
_KEPT_BLOCKS = (
    7  # of a row that its threads' registers hold; at 50304 this kernel is the faster one
)
_LOG2E = tl.constexpr(1.4426950408889634)
_E4M3_MAX = 448.0
_E5M2_SCALE = tl.constexpr(2.0**12)  # the largest gradients, about 1, leave room for a z-loss
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
                grad = tl.where(start + cols == target, 0.0, grad * _E5M2_SCALE)
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


@torch.library.custom_op("matilda_model::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    h_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    softcap: float | None,
    z_loss: float,
    with_grad: bool,
    head: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed cross-entropy, summed z-loss, their gradients for `h` (its dtype) and `w` (float32).

    The gradients are empty without `with_grad`. `w_VD` has the dtype of `h_ND`: bf16 for the heads
    `"fp8"` and `"quack"`; `"cublas"` takes any.
    """
    dh_ND = torch.empty_like(h_ND) if with_grad else h_ND.new_empty(0)
    dw_VD = w_VD.new_empty(w_VD.shape if with_grad else (0,), dtype=torch.float32)
    products: _Head = _Head(h_ND, w_VD)
    if head == "fp8":
        products = _Fp8Head(h_ND, w_VD, with_grad)
    elif head == "quack":
        products = _QuackHead(h_ND, w_VD)
    ce, zl = [], []
    for start in range(0, h_ND.shape[0], _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        logits = products.logits(rows)
        targets = targets_N[rows]
        grad8 = products.gradient_buffers(logits) if with_grad else None
        ce_N, z_N = cross_entropy_(
            logits, targets, softcap=softcap, z_loss=z_loss, with_grad=with_grad, grad8=grad8
        )
        ce.append(ce_N)
        zl.append(z_N)
        if with_grad:
            products.hidden_gradient_(dh_ND[rows], logits, grad8, targets)
            _add_weight_gradient(dw_VD, logits, h_ND[rows], first=start == 0)
        del logits, grad8  # the next chunk takes their memory
    return torch.cat(ce).sum(), torch.cat(zl).sum(), dh_ND, dw_VD


Grad8 = tuple[Tensor, Tensor]


class _Head:
    """The two products around the loss: logits, and the gradient for the hidden states."""

    def __init__(self, h_ND: Tensor, w_VD: Tensor) -> None:
        self.h_ND, self.w_VD = h_ND, w_VD

    def logits(self, rows: slice) -> Tensor:
        return self.h_ND[rows] @ self.w_VD.T

    def gradient_buffers(self, logits: Tensor) -> Grad8 | None:
        return None

    def hidden_gradient_(
        self, dh_ND: Tensor, dlogits: Tensor, grad8: Grad8 | None, targets_N: Tensor
    ) -> None:
        torch.mm(dlogits, self.w_VD, out=dh_ND)


class _QuackHead(_Head):
    """The logits by quack, which is the faster of the two there and not for the gradient."""

    def logits(self, rows: slice) -> Tensor:
        from matilda_model.quack_products import quack_product

        product: Tensor = quack_product(self.h_ND[rows], self.w_VD.T)
        return product


class _Fp8Head(_Head):
    """The same in 8 bits; see the top of this file."""

    def __init__(self, h_ND: Tensor, w_VD: Tensor, with_grad: bool) -> None:
        super().__init__(h_ND, w_VD)
        self.h8_ND, self.h_scale = _to_e4m3(h_ND)
        self.w8_VD, self.w_scale = _to_e4m3(w_VD)
        # 8-bit products want the summed dimension contiguous in both operands
        self.w8_DV = self.w8_VD.T.contiguous() if with_grad else self.w8_VD
        self.grad_scale = torch.full((), 1.0 / _E5M2_SCALE.value, device=h_ND.device)

    def logits(self, rows: slice) -> Tensor:
        return torch._scaled_mm(
            self.h8_ND[rows],
            self.w8_VD.T,
            scale_a=self.h_scale,
            scale_b=self.w_scale,
            out_dtype=self.h_ND.dtype,
            use_fast_accum=True,
        )

    def gradient_buffers(self, logits: Tensor) -> Grad8:
        n_rows = logits.shape[0]
        return (
            torch.empty_like(logits, dtype=torch.float8_e5m2),
            torch.empty(n_rows, dtype=torch.float32, device=logits.device),
        )

    def hidden_gradient_(
        self, dh_ND: Tensor, dlogits: Tensor, grad8: Grad8 | None, targets_N: Tensor
    ) -> None:
        assert grad8 is not None
        others_NV, target_N = grad8
        others_ND = torch._scaled_mm(
            others_NV,
            self.w8_DV.T,
            scale_a=self.grad_scale,
            scale_b=self.w_scale,
            out_dtype=dh_ND.dtype,
            use_fast_accum=False,  # a sum over the vocabulary needs its float32
        )
        rows_ND = self.w_VD[targets_N.clamp_min(0)]
        torch.addcmul(others_ND, rows_ND, target_N[:, None].to(rows_ND.dtype), out=dh_ND)


def _to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in e4m3 with its largest element at the end of the range, and the scale to undo it."""
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dtype=torch.float32)
    scale = largest.clamp_min(1e-12) / _E4M3_MAX
    return (x * (1.0 / scale)).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn), scale


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
    head: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalar = h_ND.new_empty((), dtype=torch.float32)
    dh_ND = torch.empty_like(h_ND) if with_grad else h_ND.new_empty(0)
    dw_VD = w_VD.new_empty(w_VD.shape if with_grad else (0,), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), dh_ND, dw_VD
