"""Triton: QK-norm and RoPE over the joint query/key/value product, one pass each way.

Forward reads the product once and writes q, k, v apart, each contiguous (cuDNN's attention is
slower on slices); backward reads their gradients and the product and writes the product's gradient
whole. FlashAttention-4's own gradient tiles can be read as they lie, which saves the passes that
would sort and round them. Importing this module needs triton.

Shape suffixes: B batch, T sequence, H query heads, K key/value heads, J = H + 2K heads together,
E head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS_FORWARD = 64
_ROWS_BACKWARD = 64
_WARPS = 4
_PROGRAMS_PER_SM = 8


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [B * T * J, E]
    q_ptr,  # [B * T * H, E]
    k_ptr,  # [B * T * K, E]
    v_ptr,  # [B * T * K, E]
    q_weight_ptr,  # f32 [E]
    k_weight_ptr,  # f32 [E]
    cos_ptr,  # f32 [T, E / 2]
    sin_ptr,  # f32 [T, E / 2]
    n_vectors,
    seq_len,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < n_vectors)[:, None]
    token = row // (H + 2 * K)
    head = (row % (H + 2 * K))[:, None]
    e = tl.arange(0, HALF)[None, :]
    source = qkv_ptr + row[:, None] * (2 * HALF) + e
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


TILE_ROWS = 64
"""Positions of a tile: the rows of a Hopper warp group's matrix product."""
_TILED_WARPS = 4
_TILED_PROGRAMS_PER_SM = 8


@triton.jit  # type: ignore[untyped-decorator]
def _load_half_tile(tile_ptr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """[64, HALF] of a tile in the order in which wgmma's float32 result lies in its threads.

    Eight columns are held by 128 threads with four values each: per warp, rows 0 to 7 and then 8
    to 15, per lane a pair of columns (PTX ISA, wgmma.mma_async.m64nNk16, fragment D).
    """
    flat = tl.load(tile_ptr + tl.arange(0, 64 * HALF))
    parts = tl.reshape(flat, (HALF // 8, 4, 8, 4, 2, 2))  # columns / 8, warp, row, pair, half, one
    return tl.reshape(tl.permute(parts, (1, 4, 2, 0, 3, 5)), (64, HALF))


@triton.jit  # type: ignore[untyped-decorator]
def _backward_from_tiles_kernel(  # type: ignore[no-untyped-def]
    dq_ptr,  # f32 [B, H, T / 64, 64 E]: tiles, unscaled
    dk_ptr,  # f32 [B, K, T / 64, 64 E]: tiles, unscaled
    dv_ptr,  # f32 [B, K, T / 64, 64 E]: tiles
    qkv_ptr,  # [B * T, J, E]
    dqkv_ptr,  # [B * T, J, E]
    q_weight_ptr,
    k_weight_ptr,
    dweight_ptr,  # f32 [H + K, programs per head, E]: partial sums
    cos_ptr,
    sin_ptr,
    n_blocks,  # B * T / 64
    blocks_per_row,  # T / 64
    eps,
    scale,
    programs_per_head,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
):
    # a program has one head: which weights it needs and sums is settled before the loop
    head = tl.program_id(0) % (H + 2 * K)
    first_block = tl.program_id(0) // (H + 2 * K)
    row = tl.arange(0, 64)[:, None].to(tl.int64)
    e = tl.arange(0, HALF)[None, :]
    tile = tl.full((), 128 * HALF, tl.int64)
    if head < H + K:
        n_heads, of_kind, tiles_ptr, weight_ptr = K, head - H, dk_ptr, k_weight_ptr
        if head < H:
            n_heads, of_kind, tiles_ptr, weight_ptr = H, head, dq_ptr, q_weight_ptr
        weight_a, weight_b = tl.load(weight_ptr + e), tl.load(weight_ptr + HALF + e)
        sum_a = tl.zeros([64, HALF], dtype=tl.float32)
        sum_b = tl.zeros([64, HALF], dtype=tl.float32)
        for block in range(first_block, n_blocks, programs_per_head):
            batch, in_row = block // blocks_per_row, block % blocks_per_row
            at = tiles_ptr + ((batch * n_heads + of_kind) * blocks_per_row + in_row) * tile
            d_first = _load_half_tile(at, HALF) * scale
            d_second = _load_half_tile(at + tile // 2, HALF) * scale
            source = ((block * 64 + row) * (H + 2 * K) + head) * (2 * HALF) + e
            a = tl.load(qkv_ptr + source).to(tl.float32)
            b = tl.load(qkv_ptr + source + HALF).to(tl.float32)
            angle = (in_row * 64 + row) * HALF + e
            cos, sin = tl.load(cos_ptr + angle), tl.load(sin_ptr + angle)
            da = d_first * cos + d_second * sin
            db = d_second * cos - d_first * sin
            rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
            a *= rstd
            b *= rstd
            sum_a += da * a
            sum_b += db * b
            da *= weight_a
            db *= weight_b
            dot = (tl.sum(da * a + db * b, 1) / (2 * HALF))[:, None]
            kind = dqkv_ptr.dtype.element_ty
            tl.store(dqkv_ptr + source, (rstd * (da - a * dot)).to(kind))
            tl.store(dqkv_ptr + source + HALF, (rstd * (db - b * dot)).to(kind))
        out = dweight_ptr + (head * programs_per_head + first_block) * (2 * HALF)
        tl.store(out + tl.arange(0, HALF), tl.sum(sum_a, 0))
        tl.store(out + HALF + tl.arange(0, HALF), tl.sum(sum_b, 0))
    else:
        for block in range(first_block, n_blocks, programs_per_head):
            batch, in_row = block // blocks_per_row, block % blocks_per_row
            at = dv_ptr + ((batch * K + head - H - K) * blocks_per_row + in_row) * tile
            source = ((block * 64 + row) * (H + 2 * K) + head) * (2 * HALF) + e
            kind = dqkv_ptr.dtype.element_ty
            tl.store(dqkv_ptr + source, _load_half_tile(at, HALF).to(kind))
            tl.store(dqkv_ptr + source + HALF, _load_half_tile(at + tile // 2, HALF).to(kind))


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
    batch, seq_len, width = qkv_BTX.shape
    e = q_weight.shape[0]
    qkv_BTX = qkv_BTX.contiguous()
    q = qkv_BTX.new_empty(batch, seq_len, n_heads, e)
    k = qkv_BTX.new_empty(batch, seq_len, n_kv_heads, e)
    v = torch.empty_like(k)
    n_vectors = batch * seq_len * (width // e)
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
        HALF=e // 2,
        ROWS=_ROWS_FORWARD,
        num_warps=_WARPS,
    )
    return q, k, v


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


@torch.library.custom_op("matilda_model::qkv_norm_rope_backward_tiled", mutates_args=())
def qkv_norm_rope_backward_tiled(
    dq_BHX: Tensor,
    dk_BKX: Tensor,
    dv_BKX: Tensor,
    qkv_BTX: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`qkv_norm_rope_backward` from tiles [B, heads, T E] in float32, those of q and k unscaled.

    A tile holds 64 positions of a head as `_load_half_tile` says; T is a multiple of 64.
    """
    batch, seq_len, _ = qkv_BTX.shape
    e = q_weight.shape[0]
    n_heads, n_kv_heads = dq_BHX.shape[1], dk_BKX.shape[1]
    qkv_BTX = qkv_BTX.contiguous()
    dqkv = torch.empty_like(qkv_BTX)
    n_blocks, heads = batch * seq_len // TILE_ROWS, n_heads + 2 * n_kv_heads
    programs = _TILED_PROGRAMS_PER_SM
    if qkv_BTX.device.type == "cuda":
        programs *= torch.cuda.get_device_properties(qkv_BTX.device).multi_processor_count
    per_head = min(triton.cdiv(programs, heads), n_blocks)
    dweight = torch.empty(
        n_heads + n_kv_heads, per_head, e, dtype=torch.float32, device=qkv_BTX.device
    )
    _backward_from_tiles_kernel[(heads * per_head,)](
        dq_BHX,
        dk_BKX,
        dv_BKX,
        qkv_BTX,
        dqkv,
        q_weight,
        k_weight,
        dweight,
        cos,
        sin,
        n_blocks,
        seq_len // TILE_ROWS,
        eps,
        e**-0.5,
        per_head,
        H=n_heads,
        K=n_kv_heads,
        HALF=e // 2,
        num_warps=_TILED_WARPS,
    )
    of_q, of_k = dweight[:n_heads].sum((0, 1)), dweight[n_heads:].sum((0, 1))
    return dqkv, torch.stack((of_q, of_k))


@qkv_norm_rope_backward_tiled.register_fake
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
        dqkv, dweight = qkv_norm_rope_backward(
            dq_BTHE, dk_BTKE, dv_BTKE, *ctx.saved_tensors, ctx.eps
        )
        return dqkv, dweight[0], dweight[1], None, None, None, None, None
