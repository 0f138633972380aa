"""FlashAttention-4 (CuTe DSL, sm_90 and later) as opaque operators, alone or with QK-norm and RoPE.

Optional: needs the `flash-attn-4` package. Unlike cuDNN's, its backward pass has a deterministic
mode, taken when torch's deterministic algorithms are on.

Shape suffixes: B batch, T sequence, H query heads, K key/value heads, E head dim.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from matilda_model.device import has_flash4_tiles, name_user
from matilda_model.second_derivative import refuse_second_derivative


@functools.cache
def _interface() -> Any:
    """flash-attn-4's functions, with its cache on disk, which it does not use unless it is told.

    Raises ValueError without the `hopper` extra.
    """
    name_user()
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except ImportError as error:
        raise ValueError(
            "FlashAttention-4 is not installed; add it with `pip install 'matilda-model[hopper]'` "
            "or set `attention` to 'auto'"
        ) from error


@torch.library.custom_op("matilda_model::fa4_forward", mutates_args=())
def fa4_forward(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention [B, T, H, E] and the log-sum-exp of its scores, float32 [B, H, T]."""
    out, lse, *_ = _interface()._flash_attn_fwd(
        q_BTHE, k_BTKE, v_BTKE, causal=True, return_lse=True
    )
    return out, lse


@fa4_forward.register_fake
def _(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
    batch, seq_len, heads, _e = q_BTHE.shape
    out = torch.empty_like(q_BTHE, memory_format=torch.contiguous_format)
    return out, q_BTHE.new_empty(batch, heads, seq_len, dtype=torch.float32)


@torch.library.custom_op("matilda_model::fa4_backward", mutates_args=())
def fa4_backward(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    out_BTHE: Tensor,
    dout_BTHE: Tensor,
    lse_BHT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    dq, dk, dv = _interface()._flash_attn_bwd(
        q_BTHE,
        k_BTKE,
        v_BTKE,
        out_BTHE,
        dout_BTHE.contiguous(),
        lse_BHT,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


@fa4_backward.register_fake
def _(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    out_BTHE: Tensor,
    dout_BTHE: Tensor,
    lse_BHT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHE, k_BTKE, v_BTKE)
    )
    return dq, dk, dv


@torch.library.custom_op("matilda_model::fa4_backward_tiled", mutates_args=())
def fa4_backward_tiled(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    out_BTHE: Tensor,
    dout_BTHE: Tensor,
    lse_BHT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v as the kernel sums them: float32 tiles [B, heads, T E].

    Unscaled, for grouped queries and T a multiple of 128; `triton_qkv_tiles` says how one lies.
    """
    tiles: list[Tensor] = []

    def keep(tile: Tensor, *_: object, **__: object) -> None:
        tiles.append(tile)

    whole = _interface()._flash_attn_bwd
    # the same function without its last step, which would sort and round the tiles
    unconverted = FunctionType(
        whole.__code__,
        {**whole.__globals__, "_bwd_postprocess_convert": keep},
        argdefs=whole.__defaults__,
    )
    unconverted(q_BTHE, k_BTKE, v_BTKE, out_BTHE, dout_BTHE.contiguous(), lse_BHT, causal=True)
    dq, dk, dv = tiles
    return dq, dk, dv


@fa4_backward_tiled.register_fake
def _(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    out_BTHE: Tensor,
    dout_BTHE: Tensor,
    lse_BHT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    def tiles(x_BTHE: Tensor) -> Tensor:
        batch, seq_len, heads, e = x_BTHE.shape
        return x_BTHE.new_empty(batch, heads, seq_len * e, dtype=torch.float32)

    return tiles(q_BTHE), tiles(k_BTKE), tiles(v_BTKE)


def takes_tiles(n_heads: int, n_kv_heads: int, head_dim: int, seq_len: int) -> bool:
    """Whether `JointAttention4` can compute this shape, with the version that is installed."""
    fits = n_kv_heads < n_heads and head_dim in (64, 128) and seq_len % 128 == 0
    return fits and bool(has_flash4_tiles())


class JointAttention4(torch.autograd.Function):
    """QK-norm, RoPE and attention; its gradient passes from one to the other in float32 tiles.

    [B, T, H, E] from the joint product [B, T, (H + 2K) E]; arguments as `FusedQKVNormRope`.
    """

    @staticmethod
    def forward(ctx, qkv_BTX, q_weight, k_weight, cos, sin, n_heads, n_kv_heads, eps):  # type: ignore[no-untyped-def]
        from matilda_model.triton_qkv import qk_norm_rope, values

        q, k = qk_norm_rope(qkv_BTX, q_weight, k_weight, cos, sin, n_heads, n_kv_heads, eps)
        out, lse = fa4_forward(q, k, values(qkv_BTX, n_heads, n_kv_heads))
        ctx.save_for_backward(q, k, out, lse, qkv_BTX, q_weight, k_weight, cos, sin)
        ctx.heads, ctx.eps = (n_heads, n_kv_heads), eps
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        refuse_second_derivative()
        from matilda_model.triton_qkv import values
        from matilda_model.triton_qkv_tiles import qkv_norm_rope_backward_tiled

        q, k, out, lse, *product = ctx.saved_tensors
        v = values(product[0], *ctx.heads)
        tiles = fa4_backward_tiled(q, k, v, out, dout, lse)
        dqkv, dweight = qkv_norm_rope_backward_tiled(*tiles, *product, ctx.eps)
        return dqkv, dweight[0], dweight[1], None, None, None, None, None


class FlashAttention4(torch.autograd.Function):
    """Causal attention over bf16 [B, T, heads, E] with its gradient."""

    @staticmethod
    def forward(ctx, q_BTHE, k_BTKE, v_BTKE):  # type: ignore[no-untyped-def]
        out, lse = fa4_forward(q_BTHE, k_BTKE, v_BTKE)
        ctx.save_for_backward(q_BTHE, k_BTKE, v_BTKE, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        refuse_second_derivative()
        q, k, v, out, lse = ctx.saved_tensors
        return fa4_backward(q, k, v, out, dout, lse)
