"""Triton: QK-norm's and RoPE's backward pass from FlashAttention-4's gradient tiles as they lie.

Saves the passes that would sort and round them; `triton_qkv` has the forward pass. Importing this
module needs triton.

Shape suffixes: B batch, T sequence, H query heads, K key/value heads, E head dim, X whatever is
left of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    row_scale_ptr,  # f32 [B * T], or None
    dots_ptr,  # f32 [J, B * T], or None
    n_blocks,  # B * T / 64
    blocks_per_row,  # T / 64
    eps,
    scale,
    programs_per_head,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    FOLDED: tl.constexpr,
):
    # a program has one head: which weights it needs and sums is settled before the loop
    head = tl.program_id(0) % (H + 2 * K)
    first_block = tl.program_id(0) // (H + 2 * K)
    row = tl.arange(0, 64)[:, None].to(tl.int64)
    of_head = head.to(tl.int64) * n_blocks * 64 + tl.arange(0, 64)
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
            if FOLDED:
                row_scale = tl.load(row_scale_ptr + block * 64 + tl.arange(0, 64))
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
            rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)
            a *= rstd[:, None]
            b *= rstd[:, None]
            sum_a += da * a
            sum_b += db * b
            da *= weight_a
            db *= weight_b
            dot = tl.sum(da * a + db * b, 1) / (2 * HALF)
            if FOLDED:
                # a norm's gradient is orthogonal to its input but for eps
                tl.store(dots_ptr + of_head + block * 64, dot * rstd * rstd * (2 * HALF * eps))
                rstd *= row_scale
            rstd, dot = rstd[:, None], dot[:, None]
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
            if FOLDED:
                row_scale = tl.load(row_scale_ptr + block * 64 + tl.arange(0, 64))[:, None]
                a = tl.load(qkv_ptr + source).to(tl.float32)
                b = tl.load(qkv_ptr + source + HALF).to(tl.float32)
            d_first = _load_half_tile(at, HALF)
            d_second = _load_half_tile(at + tile // 2, HALF)
            if FOLDED:
                tl.store(dots_ptr + of_head + block * 64, tl.sum(d_first * a + d_second * b, 1))
                d_first *= row_scale
                d_second *= row_scale
            kind = dqkv_ptr.dtype.element_ty
            tl.store(dqkv_ptr + source, d_first.to(kind))
            tl.store(dqkv_ptr + source + HALF, d_second.to(kind))


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
    tiles, rest = (dq_BHX, dk_BKX, dv_BKX), (qkv_BTX, q_weight, k_weight, cos, sin)
    dqkv, dweight, _ = _backward_from_tiles(*tiles, *rest, eps, None)
    return dqkv, dweight


@torch.library.custom_op("matilda_model::qkv_norm_rope_backward_folded", mutates_args=())
def qkv_norm_rope_backward_folded(
    dq_BHX: Tensor,
    dk_BKX: Tensor,
    dv_BKX: Tensor,
    qkv_BTX: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    row_scale_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qkv_norm_rope_backward_tiled`, its first gradient times `row_scale_N`, float32 [B T].

    Third, for each head, the sum of gradient (unscaled) times product over that head, [J, B T].
    """
    tiles, rest = (dq_BHX, dk_BKX, dv_BKX), (qkv_BTX, q_weight, k_weight, cos, sin)
    dqkv, dweight, dots_JN = _backward_from_tiles(*tiles, *rest, eps, row_scale_N)
    assert dots_JN is not None
    return dqkv, dweight, dots_JN


def _backward_from_tiles(
    dq_BHX: Tensor,
    dk_BKX: Tensor,
    dv_BKX: Tensor,
    qkv_BTX: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    row_scale_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
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
    dots_JN = None
    if row_scale_N is not None:
        dots_JN = torch.empty(heads, batch * seq_len, dtype=torch.float32, device=qkv_BTX.device)
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
        row_scale_N,
        dots_JN,
        n_blocks,
        seq_len // TILE_ROWS,
        eps,
        e**-0.5,
        per_head,
        H=n_heads,
        K=n_kv_heads,
        HALF=e // 2,
        FOLDED=row_scale_N is not None,
        num_warps=_TILED_WARPS,
    )
    of_q, of_k = dweight[:n_heads].sum((0, 1)), dweight[n_heads:].sum((0, 1))
    return dqkv, torch.stack((of_q, of_k)), dots_JN


@qkv_norm_rope_backward_tiled.register_fake
def _(
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
    dweight = q_weight.new_empty(2, q_weight.shape[0], dtype=torch.float32)
    return torch.empty_like(qkv_BTX, memory_format=torch.contiguous_format), dweight


@qkv_norm_rope_backward_folded.register_fake
def _(
    dq_BHX: Tensor,
    dk_BKX: Tensor,
    dv_BKX: Tensor,
    qkv_BTX: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    row_scale_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = q_weight.new_empty(2, q_weight.shape[0], dtype=torch.float32)
    dqkv = torch.empty_like(qkv_BTX, memory_format=torch.contiguous_format)
    heads = dq_BHX.shape[1] + 2 * dk_BKX.shape[1]
    return dqkv, dweight, row_scale_N.new_empty(heads, row_scale_N.shape[0])
