"""FlashAttention-4 (CuTe DSL, sm_90 and later) as two opaque operators.

Optional: needs the `flash-attn-4` package. Unlike cuDNN's, its backward pass has a deterministic
mode, taken when torch's deterministic algorithms are on.

Shape suffixes: B batch, T sequence, H query heads, K key/value heads, E head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("matilda_model::fa4_forward", mutates_args=())
def fa4_forward(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention [B, T, H, E] and the log-sum-exp of its scores, float32 [B, H, T]."""
    from flash_attn.cute.interface import _flash_attn_fwd  # type: ignore[import-not-found]

    out, lse, *_ = _flash_attn_fwd(q_BTHE, k_BTKE, v_BTKE, causal=True, return_lse=True)
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
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = _flash_attn_bwd(
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


class FlashAttention4(torch.autograd.Function):
    """Causal attention over bf16 [B, T, heads, E] with its gradient."""

    @staticmethod
    def forward(ctx, q_BTHE, k_BTKE, v_BTKE):  # type: ignore[no-untyped-def]
        out, lse = fa4_forward(q_BTHE, k_BTKE, v_BTKE)
        ctx.save_for_backward(q_BTHE, k_BTKE, v_BTKE, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        return fa4_backward(q, k, v, out, dout, lse)
