"""Triton: QK-norm and RoPE over the joint query/key/value product, one pass each way.

Forward reads the product once and writes q and k apart, and v where asked to, each contiguous;
backward reads their gradients and the product and writes the product's gradient
whole. Importing this module needs triton.

Shape suffixes: B batch, T sequence, H query heads, K key/value heads, J = H + 2K heads together,
E head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from matilda_model.second_derivative import refuse_second_derivative

_ROWS_FORWARD = 64
_ROWS_BACKWARD = 64
_WARPS = 4
_PROGRAMS_PER_SM = 8


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [B * T * J, E]
    q_ptr,  # [B * T * H, E]
    k_ptr,  # [B * T * K, E]
    v_ptr,  # [B * T * K, E], or None: v stays where it is
    q_weight_ptr,  # f32 [E]
    k_weight_ptr,  # f32 [E]
    cos_ptr,  # f32 [T, E / 2]
    sin_ptr,  # f32 [T, E / 2]
    n_vectors,
    seq_len,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,  # that a token has here: those of q and k, or of v, too
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < n_vectors)[:, None]
    token = row // HEADS
    head = (row % HEADS)[:, None]
    e = tl.arange(0, HALF)[None, :]
    source = qkv_ptr + (token[:, None] * (H + 2 * K) + head) * (2 * HALF) + e
    a_raw = tl.load(source, mask=inside, other=0.0)
    b_raw = tl.load(source + HALF, mask=inside, other=0.0)
    a, b = a_raw.to(tl.float32), b_raw.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
    a *= rstd * tl.where(head < H, tl.load(q_weight_ptr + e), tl.load(k_weight_ptr + e))
    b *= rstd * tl.where(
        head < H, tl.load(q_weight_ptr + HALF + e), tl.load(k_weight_ptr + HALF + e)
    )
    angle = (token % seq_len)[:, None] * HALF + e
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    first = (a * cos - b * sin).to(a_raw.dtype)
    second = (b * cos + a * sin).to(a_raw.dtype)

    q_at = q_ptr + (token[:, None] * H + head) * (2 * HALF) + e
    is_q = inside & (head < H)
    tl.store(q_at, first, mask=is_q)
    tl.store(q_at + HALF, second, mask=is_q)
    k_at = k_ptr + (token[:, None] * K + head - H) * (2 * HALF) + e
    is_k = inside & (head >= H) & (head < H + K)
    tl.store(k_at, first, mask=is_k)
    tl.store(k_at + HALF, second, mask=is_k)
    if HEADS == H + 2 * K:
        v_at = v_ptr + (token[:, None] * K + head - H - K) * (2 * HALF) + e
        is_v = inside & (head >= H + K)
        tl.store(v_at, a_raw, mask=is_v)
        tl.store(v_at + HALF, b_raw, mask=is_v)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    dq_ptr,  # [B, T, H, E] by strides
    dk_ptr,  # [B, T, K, E] by strides
    dv_ptr,  # [B, T, K, E] by strides
    qkv_ptr,  # [B * T * J, E]
    dqkv_ptr,  # [B * T * J, E]
    q_weight_ptr,
    k_weight_ptr,
    dweight_ptr,  # f32 [programs, 2 (q, k), E]: partial sums
    cos_ptr,
    sin_ptr,
    n_vectors,
    seq_len,
    eps,
    dq_b,
    dq_t,
    dq_h,
    dk_b,
    dk_t,
    dk_h,
    dv_b,
    dv_t,
    dv_h,
    n_programs,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    e = tl.arange(0, HALF)[None, :]
    q_weight_a, q_weight_b = tl.load(q_weight_ptr + e), tl.load(q_weight_ptr + HALF + e)
    k_weight_a, k_weight_b = tl.load(k_weight_ptr + e), tl.load(k_weight_ptr + HALF + e)
    sum_q_a = tl.zeros([ROWS, HALF], dtype=tl.float32)
    sum_q_b = tl.zeros([ROWS, HALF], dtype=tl.float32)
    sum_k_a = tl.zeros([ROWS, HALF], dtype=tl.float32)
    sum_k_b = tl.zeros([ROWS, HALF], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_vectors, ROWS), n_programs):
        row = tl.arange(0, ROWS).to(tl.int64) + block * ROWS
        inside = (row < n_vectors)[:, None]
        token = row // (H + 2 * K)
        head = (row % (H + 2 * K))[:, None]
        batch, position = (token // seq_len)[:, None], (token % seq_len)[:, None]
        is_q = inside & (head < H)
        is_k = inside & (head >= H) & (head < H + K)
        is_v = inside & (head >= H + K)
        dq_at = dq_ptr + batch * dq_b + position * dq_t + head * dq_h + e
        dk_at = dk_ptr + batch * dk_b + position * dk_t + (head - H) * dk_h + e
        dv_at = dv_ptr + batch * dv_b + position * dv_t + (head - H - K) * dv_h + e
        # each row has one of the three; the other two loads are masked off and cost nothing
        d_first = tl.load(dq_at, mask=is_q, other=0.0) + tl.load(dk_at, mask=is_k, other=0.0)
        d_second = tl.load(dq_at + HALF, mask=is_q, other=0.0) + tl.load(
            dk_at + HALF, mask=is_k, other=0.0
        )
        dv_a = tl.load(dv_at, mask=is_v, other=0.0)
        dv_b_half = tl.load(dv_at + HALF, mask=is_v, other=0.0)
        source = row[:, None] * (2 * HALF) + e
        is_qk = inside & (head < H + K)
        a = tl.load(qkv_ptr + source, mask=is_qk, other=0.0).to(tl.float32)
        b = tl.load(qkv_ptr + source + HALF, mask=is_qk, other=0.0).to(tl.float32)
        angle = position * HALF + e
        cos = tl.load(cos_ptr + angle, mask=is_qk, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=is_qk, other=0.0)

        d_first, d_second = d_first.to(tl.float32), d_second.to(tl.float32)
        da = d_first * cos + d_second * sin
        db = d_second * cos - d_first * sin
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
        a *= rstd
        b *= rstd
        sum_q_a += tl.where(head < H, da * a, 0.0)
        sum_q_b += tl.where(head < H, db * b, 0.0)
        sum_k_a += tl.where(head < H, 0.0, da * a)
        sum_k_b += tl.where(head < H, 0.0, db * b)
        da *= tl.where(head < H, q_weight_a, k_weight_a)
        db *= tl.where(head < H, q_weight_b, k_weight_b)
        dot = (tl.sum(da * a + db * b, 1) / (2 * HALF))[:, None]
        da = rstd * (da - a * dot)
        db = rstd * (db - b * dot)
        kind = dqkv_ptr.dtype.element_ty
        tl.store(dqkv_ptr + source, tl.where(is_v, dv_a, da.to(kind)), mask=inside)
        tl.store(dqkv_ptr + source + HALF, tl.where(is_v, dv_b_half, db.to(kind)), mask=inside)

    out = dweight_ptr + tl.program_id(0) * (4 * HALF) + tl.arange(0, HALF)
    tl.store(out, tl.sum(sum_q_a, 0))
    tl.store(out + HALF, tl.sum(sum_q_b, 0))
    tl.store(out + 2 * HALF, tl.sum(sum_k_a, 0))
    tl.store(out + 3 * HALF, tl.sum(sum_k_b, 0))


@torch.library.custom_op("matilda_model::qkv_norm_rope", mutates_args=())
def qkv_norm_rope(
    qkv_BTX: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, E], k and v [B, T, K, E] from [B, T, (H + 2K) E]; cos, sin are [T, E / 2]."""
    product = qkv_BTX.contiguous()
    v = product.new_empty(*product.shape[:2], n_kv_heads, q_weight.shape[0])
    q, k = _normed_and_rotated(product, v, q_weight, k_weight, cos, sin, n_heads, n_kv_heads, eps)
    return q, k, v


@torch.library.custom_op("matilda_model::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    qkv_BTX: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`qkv_norm_rope` without v, for who can read it where it lies: see `values`."""
    product = qkv_BTX.contiguous()
    return _normed_and_rotated(
        product, None, q_weight, k_weight, cos, sin, n_heads, n_kv_heads, eps
    )


def values(qkv_BTX: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """v within the joint product, a view [B, T, K, E]."""
    heads = n_heads + 2 * n_kv_heads
    return qkv_BTX.view(*qkv_BTX.shape[:2], heads, -1)[:, :, n_heads + n_kv_heads :]


def _normed_and_rotated(
    qkv_BTX: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q and k; v is copied to `v` unless it is None."""
    batch, seq_len, _ = qkv_BTX.shape
    e = q_weight.shape[0]
    q = qkv_BTX.new_empty(batch, seq_len, n_heads, e)
    k = qkv_BTX.new_empty(batch, seq_len, n_kv_heads, e)
    heads = n_heads + n_kv_heads * (1 if v is None else 2)
    n_vectors = batch * seq_len * heads
    _forward_kernel[(triton.cdiv(n_vectors, _ROWS_FORWARD),)](
        qkv_BTX,
        q,
        k,
        v,
        q_weight,
        k_weight,
        cos,
        sin,
        n_vectors,
        seq_len,
        eps,
        H=n_heads,
        K=n_kv_heads,
        HEADS=heads,
        HALF=e // 2,
        ROWS=_ROWS_FORWARD,
        num_warps=_WARPS,
    )
    return q, k


@qkv_norm_rope.register_fake
def _(
    qkv_BTX: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq_len, _ = qkv_BTX.shape
    e = q_weight.shape[0]
    k = qkv_BTX.new_empty(batch, seq_len, n_kv_heads, e)
    return qkv_BTX.new_empty(batch, seq_len, n_heads, e), k, torch.empty_like(k)


@qk_norm_rope.register_fake
def _(
    qkv_BTX: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, seq_len, _ = qkv_BTX.shape
    e = q_weight.shape[0]
    q = qkv_BTX.new_empty(batch, seq_len, n_heads, e)
    return q, qkv_BTX.new_empty(batch, seq_len, n_kv_heads, e)


@torch.library.custom_op("matilda_model::qkv_norm_rope_backward", mutates_args=())
def qkv_norm_rope_backward(
    dq_BTHE: Tensor,
    dk_BTKE: Tensor,
    dv_BTKE: Tensor,
    qkv_BTX: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the product [B, T, (H + 2K) E] and of both norm weights, float32 [2, E]."""
    batch, seq_len, n_heads, e = dq_BTHE.shape
    n_kv_heads = dk_BTKE.shape[2]
    qkv_BTX = qkv_BTX.contiguous()
    dqkv = torch.empty_like(qkv_BTX)
    parts = [d if d.stride(-1) == 1 else d.contiguous() for d in (dq_BTHE, dk_BTKE, dv_BTKE)]
    n_vectors = batch * seq_len * (n_heads + 2 * n_kv_heads)
    programs = _PROGRAMS_PER_SM
    if qkv_BTX.device.type == "cuda":
        programs *= torch.cuda.get_device_properties(qkv_BTX.device).multi_processor_count
    programs = min(programs, triton.cdiv(n_vectors, _ROWS_BACKWARD))
    dweight = torch.empty(programs, 2, e, dtype=torch.float32, device=qkv_BTX.device)
    _backward_kernel[(programs,)](
        *parts,
        qkv_BTX,
        dqkv,
        q_weight,
        k_weight,
        dweight,
        cos,
        sin,
        n_vectors,
        seq_len,
        eps,
        *(stride for part in parts for stride in part.stride()[:3]),
        programs,
        H=n_heads,
        K=n_kv_heads,
        HALF=e // 2,
        ROWS=_ROWS_BACKWARD,
        num_warps=_WARPS,
    )
    return dqkv, dweight.sum(0)


@qkv_norm_rope_backward.register_fake
def _(
    dq_BTHE: Tensor,
    dk_BTKE: Tensor,
    dv_BTKE: Tensor,
    qkv_BTX: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dweight = q_weight.new_empty(2, q_weight.shape[0], dtype=torch.float32)
    return torch.empty_like(qkv_BTX, memory_format=torch.contiguous_format), dweight


class FusedQKVNormRope(torch.autograd.Function):
    """`qkv_norm_rope` with its gradient; cos and sin are constants."""

    @staticmethod
    def forward(ctx, qkv_BTX, q_weight, k_weight, cos, sin, n_heads, n_kv_heads, eps):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(qkv_BTX, q_weight, k_weight, cos, sin)
        ctx.eps = eps
        return qkv_norm_rope(qkv_BTX, q_weight, k_weight, cos, sin, n_heads, n_kv_heads, eps)

    @staticmethod
    def backward(ctx, dq_BTHE, dk_BTKE, dv_BTKE):  # type: ignore[no-untyped-def]
        refuse_second_derivative()
        dqkv, dweight = qkv_norm_rope_backward(
            dq_BTHE, dk_BTKE, dv_BTKE, *ctx.saved_tensors, ctx.eps
        )
        return dqkv, dweight[0], dweight[1], None, None, None, None, None
