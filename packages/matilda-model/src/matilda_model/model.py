"""The transformer: embedding, blocks, final norm, head and loss.

Shape suffixes: B batch, T sequence, D model, H query heads, E head dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self, overload

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from matilda_model.attention import Attention
from matilda_model.cache import KVCache, LayerCache
from matilda_model.config import ModelConfig
from matilda_model.layers import Linear, ReLU2, RMSNorm, SwiGLU, are_bare, rope_table
from matilda_model.loss import (
    LossOutput,
    linear_cross_entropy,
    softcap_logits,
    token_cross_entropy,
)


def row_squares(x_BTD: Tensor) -> Tensor:
    """Sums of squares of the rows, float32 [B T], without a gradient: see `Block.folded`."""
    return x_BTD.detach().float().square().sum(-1).flatten()


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.norm_backend = config.norm
        self.may_fold = True
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp: nn.Module = SwiGLU(config) if config.mlp == "swiglu" else ReLU2(config)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        input_ids_BT: Tensor,
        cache: LayerCache | None = None,
        squares_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after the block, and the sums of squares of its rows, if known.

        `squares_N`, float32 [B T], are those of `x_BTD` and given where the block `folds` alone.
        """
        if squares_N is not None:
            return self.folded(x_BTD, squares_N, cos, sin)
        normed_BTD, x_BTD = self.attn_norm.branch(x_BTD, self.norm_backend)
        x_BTD = self.attn(normed_BTD, cos, sin, input_ids_BT, cache, x_BTD)
        normed_BTD, x_BTD = self.mlp_norm.branch(x_BTD, self.norm_backend)
        return self.mlp(normed_BTD, x_BTD), None

    def folds(self, x_BTD: Tensor) -> bool:
        """Whether both norms are parts of the products around them here."""
        asked = self.may_fold and self.norm_backend in ("auto", "folded")
        if not (asked and isinstance(self.mlp, ReLU2)):
            return False
        if not are_bare(self.attn.o, self.mlp.up, self.mlp.down):
            return False
        quack = self.mlp.kind(x_BTD) == "quack_all" and self.attn.takes_quack(x_BTD, "quack_all")
        return quack and self.attn.joins(x_BTD)

    def folded(
        self, x_BTD: Tensor, squares_N: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward` with the weights of both norms in the matrices after them."""
        from matilda_model.quack_folded import FoldedAttention4, FoldedReLU2

        attn, dtype = self.attn, x_BTD.dtype
        assert isinstance(self.mlp, ReLU2)
        assert attn.q_norm is not None
        assert attn.k_norm is not None
        joint_XD = (attn.joint_weight() * self.attn_norm.weight).to(dtype)
        x_BTD, squares_N = FoldedAttention4.apply(
            x_BTD,
            squares_N,
            joint_XD,
            attn.q_norm.weight,
            attn.k_norm.weight,
            cos,
            sin,
            attn.o.weight.to(dtype),
            attn.n_heads,
            attn.n_kv_heads,
            self.attn_norm.eps,
            attn.q_norm.eps,
        )
        up_FD = (self.mlp.up.weight * self.mlp_norm.weight).to(dtype)
        down_DF = self.mlp.down.weight.to(dtype)
        x_ND, squares_N = FoldedReLU2.apply(
            x_BTD.flatten(0, 1), squares_N, up_FD, down_DF, self.mlp_norm.eps
        )
        return x_ND.view(x_BTD.shape), squares_N


class Transformer(nn.Module):
    """Decoder-only language model.

    Parameters are float32 master weights on torch's default device. Activations have
    `compute_dtype` (float32 until set: `model.compute_dtype = torch.bfloat16`); norms, RoPE,
    logits and loss are float32 whatever it is. Initial values come from torch's default generator,
    so `torch.manual_seed` fixes them; a model made on the meta device has its values from
    `init_weights` or `load_state_dict` after `to_empty`, or from `load_state_dict(…, assign=True)`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        table = torch.empty(config.vocab_size, config.d_model)
        self.embed = nn.Embedding(config.vocab_size, config.d_model, _weight=table)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)
        self.residual_scale: nn.Parameter | None = None
        self.embed_scale: nn.Parameter | None = None
        if config.residual_scalars:
            self.residual_scale = nn.Parameter(torch.empty(config.n_layers))
            self.embed_scale = nn.Parameter(torch.empty(config.n_layers))
        half = config.resolved_head_dim // 2
        self.register_buffer("cos", torch.empty(config.max_seq_len, half), persistent=False)
        self.register_buffer("sin", torch.empty(config.max_seq_len, half), persistent=False)
        if self.embed.weight.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter and the RoPE table; draws from `generator` or the default one."""
        config = self.config
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name == "embed_scale" else 1.0)
                continue
            std = config.init_std
            if name in ("embed.weight", "head.weight") or name.endswith("value_embed.weight"):
                std = config.resolved_embed_init_std
            elif name.endswith("value_gate.weight"):
                std = 0.0
            elif name.endswith(("attn.o.weight", "mlp.down.weight")):
                outputs = 0.0 if config.zero_init_outputs else config.init_std
                std = outputs / math.sqrt(2 * config.n_layers)
            parameter.normal_(0.0, std, generator=generator)
        self._fill_rope()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """torch's; the RoPE table, which no state holds, follows parameters off the meta device."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if self.cos.is_meta and not self.embed.weight.is_meta:
            self._fill_rope(self.embed.weight.device)
        return result

    def _fill_rope(self, device: torch.device | None = None) -> None:
        """Set the RoPE table, float32 whatever the parameters are, on its device or another."""
        config = self.config
        device = device or self.cos.device
        self.cos, self.sin = rope_table(
            config.max_seq_len, config.resolved_head_dim, config.rope_theta, device
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `to_empty`, `bfloat16` and their like do, keeping the RoPE table true."""
        was_meta = self.cos.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta or self.cos.dtype != torch.float32:
            self._fill_rope()
        return self

    def choose_backends(
        self,
        *,
        attention: str | None = None,
        loss: str | None = None,
        matmul: str | None = None,
        norm: str | None = None,
    ) -> None:
        """Change these fields of the config, those that are not None; before compiling."""
        named = {"attention": attention, "loss": loss, "matmul": matmul, "norm": norm}
        chosen: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        self.config = dataclasses.replace(self.config, **chosen)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend, module.norm = self.config.attention, self.config.norm
                module.matmul = self.config.matmul
            elif isinstance(module, ReLU2):
                module.matmul = self.config.matmul
            elif isinstance(module, Block):
                module.norm_backend = self.config.norm

    @overload
    def forward(
        self,
        input_ids_BT: Tensor,
        targets_BT: None = None,
        *,
        cache: KVCache | None = None,
        places_B: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(self, input_ids_BT: Tensor, targets_BT: Tensor) -> LossOutput: ...

    @overload
    def forward(
        self, input_ids_BT: Tensor, targets_BT: Tensor, *, per_token: Literal[True]
    ) -> Tensor: ...

    def forward(
        self,
        input_ids_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        places_B: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor | LossOutput:
        """Logits [B, T, V] in float32 after the soft-cap or, with targets, the mean loss.

        `input_ids_BT` and `targets_BT` are int64 of one shape; targets are already shifted (target
        t is the token after input t) and negative ones are ignored (except by the `"liger"` back
        end). `per_token` gives each target's cross-entropy instead, [B, T] in float32 nats, for
        evaluation: without gradient or z-loss. With a `cache` the ids continue it; see `KVCache`.
        With `places_B` (int64 [B]) there are logits of that place of each row alone, [B, V]: of a
        long prompt all of them take far more memory than the one that is drawn from.

        Raises ValueError for other shapes (one row is [1, T]), `per_token` without targets, a cache
        or places with them, and sequences longer than `max_seq_len`.
        """
        if targets_BT is None:
            if per_token:
                raise ValueError("`per_token` gives the loss of each target: give `targets_BT`")
            h_BTD = self.hidden(input_ids_BT, cache=cache)
            if places_B is None:
                return self.logits(h_BTD)
            if places_B.shape != input_ids_BT.shape[:1]:
                raise ValueError(
                    f"`places_B` has shape {tuple(places_B.shape)!r}: give one place for each of "
                    f"the {input_ids_BT.shape[0]!r} rows"
                )
            rows_B = torch.arange(h_BTD.shape[0], device=h_BTD.device)
            return self.logits(h_BTD[rows_B, places_B])
        if places_B is not None:
            raise ValueError("`places_B` chooses logits: give either it or `targets_BT`")
        if cache is not None:
            raise ValueError("a `cache` is for generation: give either it or `targets_BT`")
        if targets_BT.shape != input_ids_BT.shape:
            raise ValueError(
                f"`targets_BT` has shape {tuple(targets_BT.shape)!r}, `input_ids_BT` "
                f"{tuple(input_ids_BT.shape)!r}: give one target for each token"
            )
        h_BTD = self.hidden(input_ids_BT)
        if per_token:
            losses_N = token_cross_entropy(
                h_BTD.flatten(0, 1),
                self._head_weight,
                targets_BT.flatten(),
                softcap=self.config.logit_softcap,
            )
            return losses_N.view(targets_BT.shape)
        return linear_cross_entropy(
            h_BTD.flatten(0, 1),
            self._head_weight,
            targets_BT.flatten(),
            softcap=self.config.logit_softcap,
            z_loss=self.config.z_loss,
            backend=self.config.loss,
        )

    @contextlib.contextmanager
    def norms_apart(self) -> Iterator[None]:
        """While it lasts, each part of a block is a call of its own module, which hooks see."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        for block in blocks:
            block.may_fold = False
        try:
            yield
        finally:
            for block in blocks:
                block.may_fold = True

    def get_output_embeddings(self) -> nn.Module:
        """The module whose weight [V, D] makes the logits; its name is transformers'."""
        return self.embed if self.head is None else self.head

    @property
    def _head_weight(self) -> Tensor:
        """[V, D], float32. The loss multiplies by it, so that a head is read and never called."""
        if self.head is None:
            return self.embed.weight
        if not isinstance(self.head, nn.Linear) or self.head.bias is not None:
            raise ValueError(
                f"`head` is a {type(self.head).__name__} now, of which the loss would read the "
                "weight alone: merge what was put on it, or adapt other layers"
            )
        return self.head.weight

    def logits(self, h: Tensor) -> Tensor:
        """What `hidden` gives, [..., D], to float32 logits after the soft-cap, [..., V]."""
        logits = F.linear(h, self._head_weight.to(h.dtype)).float()
        return softcap_logits(logits, self.config.logit_softcap)

    def hidden(self, input_ids_BT: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """What the head multiplies, [B, T, D] in `compute_dtype`: normed and logit-scaled."""
        if input_ids_BT.ndim != 2:
            raise ValueError(
                f"`input_ids_BT` has shape {tuple(input_ids_BT.shape)!r}: give rows of ids, "
                "[B, T], such as `ids[None]` for one row"
            )
        n_tokens = input_ids_BT.shape[1]
        if n_tokens > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {n_tokens!r} tokens exceeds `max_seq_len` "
                f"{self.config.max_seq_len!r}: shorten it or make the model with a larger one"
            )
        if cache is None:
            cos, sin = self.cos[:n_tokens, None, :], self.sin[:n_tokens, None, :]
        else:
            cache.check_rows(input_ids_BT.shape[0])
            positions_BT = cache.next_positions(n_tokens)
            cos, sin = self.cos[positions_BT, None, :], self.sin[positions_BT, None, :]
            if self.config.document_token is not None:
                cache.note_documents(input_ids_BT, self.config.document_token)
        x_BTD = self.embed(input_ids_BT).to(self.compute_dtype)
        embedding_BTD = x_BTD
        squares_N: Tensor | None = None
        blocks: list[Any] = list(self.blocks)
        for index, block in enumerate(blocks):
            if self.residual_scale is not None and self.embed_scale is not None:
                r, e = self.residual_scale[index], self.embed_scale[index]
                x_BTD = r.to(x_BTD.dtype) * x_BTD + e.to(x_BTD.dtype) * embedding_BTD
                squares_N = None
            layer = None if cache is None else cache.layers[index]
            if not block.folds(x_BTD):
                squares_N = None
            elif squares_N is None:
                squares_N = row_squares(x_BTD)
            x_BTD, squares_N = block(x_BTD, cos, sin, input_ids_BT, layer, squares_N)
        if cache is not None:
            cache.advance(n_tokens)
        out: Tensor = self.norm(x_BTD)
        return out if self.config.logit_scale == 1.0 else out * self.config.logit_scale
