"""Grouped-query causal attention with QK-norm and RoPE, and the choice of its kernel.

Shape suffixes: B batch, T sequence, S cached sequence, D model, H query heads, K key/value heads,
E head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from matilda_model.cache import LayerCache
from matilda_model.config import GATE_CHANNELS, ModelConfig
from matilda_model.device import has_flash4, has_quack, has_triton
from matilda_model.layers import Linear, RMSNorm, apply_rope, are_bare

_SDPA_ORDER = {
    # cuDNN first: 276 against 180 TFLOP/s (flash) at head dim 64, T=2048, forward + backward, H100
    "auto": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "math": [SDPBackend.MATH],
}


def causal_attention(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    backend: str,
    window: int | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention, scale `1/sqrt(E)`; [B, T, H, E] in the dtype of the inputs.

    With a `window` each query sees that many keys, its own the last; with `documents_BT` (see
    `count_documents`) only those of its own document. Raises ValueError for a back end of CUDA's
    on a CPU.
    """
    if backend in ("cudnn", "fa4", "fa4_joint") and q_BTHE.device.type == "cpu":
        raise ValueError(
            f"`attention` back end {backend!r} runs on CUDA only: use 'auto' or 'math' on this "
            "device"
        )
    masked = window is not None or documents_BT is not None
    if backend == "flex" or (masked and backend == "auto" and q_BTHE.is_cuda):
        return _flex_attention(q_BTHE, k_BTKE, v_BTKE, window, documents_BT)
    if backend in ("fa4", "fa4_joint") or (
        backend == "auto" and _prefers_flash4(q_BTHE, q_BTHE.shape[-1])
    ):
        from matilda_model.flash4 import FlashAttention4

        fa4_BTHE: Tensor = FlashAttention4.apply(q_BTHE, k_BTKE, v_BTKE)
        return fa4_BTHE
    q_BHTE, k_BKTE, v_BKTE = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    gqa = q_BTHE.shape[2] != k_BTKE.shape[2]
    mask = causal_mask(q_BTHE.shape[1], window, q_BTHE.device) if masked else None
    if mask is not None and documents_BT is not None:
        mask = mask & same_document(documents_BT)
    causal = mask is None
    if backend == "auto" and q_BTHE.device.type == "cpu":
        # torch's own choice on a CPU is the flash kernel; a context manager a layer costs more
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, is_causal=causal, enable_gqa=gqa
        )
    else:
        with sdpa_kernel(_SDPA_ORDER[backend], set_priority=True):
            y_BHTE = F.scaled_dot_product_attention(
                q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, is_causal=causal, enable_gqa=gqa
            )
    return y_BHTE.transpose(1, 2)


def _prefers_flash4(x: Tensor, head_dim: int) -> bool:
    """Measured on Hopper in bf16: forward as cuDNN's, backward a sixth faster (docs/LOG.md)."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and head_dim <= 128
        and not torch.are_deterministic_algorithms_enabled()
        and bool(has_flash4())
    )


def causal_mask(seq_len: int, window: int | None, device: torch.device) -> Tensor:
    """What each query may see, bool [T, T]: True at [t, s] for `t - window < s <= t`."""
    position = torch.arange(seq_len, device=device)
    distance_TT = position[:, None] - position[None, :]
    visible_TT = distance_TT >= 0
    return visible_TT if window is None else visible_TT & (distance_TT < window)


def count_documents(input_ids_BT: Tensor, token: int) -> Tensor:
    """The number of each token's document within its row, int64 [B, T]; `token` begins one."""
    return (input_ids_BT == token).cumsum(1)


def same_document(documents_BT: Tensor) -> Tensor:
    """Whether query t and key s are of one document, bool [B, 1, T, T]."""
    return documents_BT[:, None, :, None] == documents_BT[:, None, None, :]


def _flex_attention(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    window: int | None,
    documents_BT: Tensor | None,
) -> Tensor:
    """FlexAttention: skips the blocks that no query of theirs sees; fast compiled only."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen = t >= s
        if window is not None:
            seen = seen & (t - s < window)
        if documents_BT is not None:
            seen = seen & (documents_BT[b, t] == documents_BT[b, s])
        return seen

    batch, seq_len = q_BTHE.shape[:2]
    rows = None if documents_BT is None else batch
    blocks = create_block_mask(visible, rows, None, seq_len, seq_len, device=q_BTHE.device.type)
    y_BHTE = flex_attention(
        q_BTHE.transpose(1, 2),
        k_BTKE.transpose(1, 2),
        v_BTKE.transpose(1, 2),
        block_mask=blocks,
        enable_gqa=q_BTHE.shape[2] != k_BTKE.shape[2],
    )
    return y_BHTE.transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention: `q`, `k`, `v`, `o` projections, QK-norm, RoPE, grouped queries."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        e = config.resolved_head_dim
        self.head_dim = e
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.backend = config.attention
        self.window = config.layer_window(layer)
        self.document_token = config.document_token
        self.norm = config.norm
        self.matmul = config.matmul
        self.q = Linear(config.d_model, config.n_heads * e)
        self.k = Linear(config.d_model, config.n_kv_heads * e)
        self.v = Linear(config.d_model, config.n_kv_heads * e)
        self.o = Linear(config.n_heads * e, config.d_model)
        self.q_norm = RMSNorm(e, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(e, config.norm_eps) if config.qk_norm else None
        gated = config.has_value_embedding(layer)
        self.value_embed = (
            nn.Embedding(
                config.vocab_size,
                config.n_kv_heads * e,
                _weight=torch.empty(config.vocab_size, config.n_kv_heads * e),
            )
            if gated
            else None
        )
        self.value_gate = (
            Linear(min(GATE_CHANNELS, config.d_model), config.n_kv_heads) if gated else None
        )

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        input_ids_BT: Tensor,
        cache: LayerCache | None = None,
        residual_BTD: Tensor | None = None,
    ) -> Tensor:
        """Attention's output for the normed `x_BTD`, plus `residual_BTD` when given."""
        if cache is None and self.joins(x_BTD):
            return self.output(self.attend_jointly(x_BTD, cos, sin).flatten(2), residual_BTD)
        q_BTHE, k_BTKE, v_BTKE = self.heads(x_BTD, cos, sin, plain=cache is not None)
        if self.value_embed is not None and self.value_gate is not None:
            gate_BTK = 2.0 * torch.sigmoid(self.value_gate(x_BTD[..., :GATE_CHANNELS]))
            added = self.value_embed(input_ids_BT).to(v_BTKE.dtype)
            v_BTKE = v_BTKE + gate_BTK[..., None] * added.view_as(v_BTKE)
        if cache is None:
            documents_BT = self.documents(input_ids_BT)
            y_BTHE = causal_attention(
                q_BTHE, k_BTKE, v_BTKE, self.backend, self.window, documents_BT
            )
        else:
            y_BTHE = cache.attend(q_BTHE, k_BTKE, v_BTKE, self.window)
        return self.output(y_BTHE.flatten(2), residual_BTD)

    def output(self, y_BTX: Tensor, residual_BTD: Tensor | None) -> Tensor:
        """The output projection of joined heads [B, T, H * E], plus the residual when given."""
        if residual_BTD is None:
            alone: Tensor = self.o(y_BTX)
            return alone
        if self.takes_quack(y_BTX, "quack_residual", "quack_all") and are_bare(self.o):
            from matilda_model.quack_products import QuackLinearAdd

            weight = self.o.weight.to(y_BTX.dtype)
            flat: Tensor = QuackLinearAdd.apply(
                y_BTX.flatten(0, 1),
                weight,
                residual_BTD.flatten(0, 1),
                self.takes_quack(y_BTX, "quack_all"),
            )
            return flat.view(residual_BTD.shape)
        added: Tensor = residual_BTD + self.o(y_BTX)
        return added

    def takes_quack(self, x: Tensor, *backends: str) -> bool:
        """Whether `matmul` is one of `backends` here, or `"auto"` and taken to be."""
        if not (x.is_cuda and x.requires_grad and x.dtype == torch.bfloat16):
            return False
        return self.matmul in backends or (self.matmul == "auto" and bool(has_quack()))

    def documents(self, input_ids_BT: Tensor) -> Tensor | None:
        """Which document each token is of, when that bounds what it sees."""
        if self.document_token is None:
            return None
        return count_documents(input_ids_BT, self.document_token)

    def heads(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, *, plain: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, E], keys and values [B, T, K, E], normed and rotated."""
        if not plain and self._fuses(x_BTD):
            return self._project_fused(x_BTD, cos, sin)
        q_BTHE, k_BTKE, v_BTKE = self._project(x_BTD)
        q_BTHE = _norm_and_rotate(q_BTHE, self.q_norm, cos, sin)
        return q_BTHE, _norm_and_rotate(k_BTKE, self.k_norm, cos, sin), v_BTKE

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, e = x_BTD.shape[:2], self.head_dim
        if not are_bare(self.q, self.k, self.v) or x_BTD.dtype == self.q.weight.dtype:
            return (
                self.q(x_BTD).view(*rows, self.n_heads, e),
                self.k(x_BTD).view(*rows, self.n_kv_heads, e),
                self.v(x_BTD).view(*rows, self.n_kv_heads, e),
            )
        sizes = [self.n_heads, self.n_kv_heads, self.n_kv_heads]
        qkv = self.joint_product(x_BTD).view(*rows, sum(sizes), e)
        q_BTHE, k_BTKE, v_BTKE = torch.split(qkv, sizes, dim=-2)
        return q_BTHE, k_BTKE, v_BTKE

    def joint_weight(self) -> Tensor:
        """Weights of q, k and v, float32 [(H + 2K) E, D]: one wide matmul runs faster."""
        # each is cast to the dtype of the activations anyway, so joining them is free
        return torch.cat((self.q.weight, self.k.weight, self.v.weight))

    def joint_product(self, x_BTD: Tensor) -> Tensor:
        """`x_BTD` times the joined weights of q, k and v: [B, T, (H + 2K) E]."""
        joint = self.joint_weight().to(x_BTD.dtype)
        if self.takes_quack(x_BTD, "quack_all"):
            from matilda_model.quack_products import QuackLinear

            flat: Tensor = QuackLinear.apply(x_BTD.flatten(0, 1), joint)
            return flat.view(*x_BTD.shape[:2], -1)
        return F.linear(x_BTD, joint)

    def _fuses(self, x_BTD: Tensor) -> bool:
        if self.norm == "plain" or x_BTD.device.type != "cuda" or self.q_norm is None:
            return False
        if not are_bare(self.q, self.k, self.v):
            return False
        asked = self.norm in ("fused", "folded")
        return asked or (x_BTD.dtype == torch.bfloat16 and bool(has_triton()))

    def joins(self, x_BTD: Tensor) -> bool:
        """Whether norm, RoPE and attention are one step here (FlashAttention-4 on Hopper)."""
        if self.backend not in ("auto", "fa4_joint") or not self._fuses(x_BTD):
            return False
        if self.window is not None or self.document_token is not None:
            return False
        if self.value_embed is not None:
            return False
        from matilda_model.flash4 import takes_tiles

        fits = takes_tiles(self.n_heads, self.n_kv_heads, self.head_dim, x_BTD.shape[1])
        return fits and (self.backend == "fa4_joint" or _prefers_flash4(x_BTD, self.head_dim))

    def attend_jointly(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads' outputs [B, T, H, E] of the normed `x_BTD`."""
        from matilda_model.flash4 import JointAttention4

        y_BTHE: Tensor = JointAttention4.apply(*self._normed_product(x_BTD, cos, sin))
        return y_BTHE

    def _project_fused(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from matilda_model.triton_qkv import FusedQKVNormRope

        q_BTHE, k_BTKE, v_BTKE = FusedQKVNormRope.apply(*self._normed_product(x_BTD, cos, sin))
        return q_BTHE, k_BTKE, v_BTKE

    def _normed_product(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Any, ...]:
        """Arguments of `FusedQKVNormRope`."""
        assert self.q_norm is not None
        assert self.k_norm is not None
        weights = self.q_norm.weight, self.k_norm.weight
        heads = self.n_heads, self.n_kv_heads
        return (self.joint_product(x_BTD), *weights, cos, sin, *heads, self.q_norm.eps)


def _norm_and_rotate(x_BTHE: Tensor, norm: RMSNorm | None, cos: Tensor, sin: Tensor) -> Tensor:
    """QK-norm and RoPE in float32, one rounding at the end: a single pass when compiled."""
    x = x_BTHE.float()
    if norm is not None:
        x = norm(x)
    return apply_rope(x, cos, sin).to(x_BTHE.dtype)
