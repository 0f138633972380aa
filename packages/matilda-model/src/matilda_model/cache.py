"""Keys and values of past tokens, for generation; rows of a batch may have unequal lengths.

Prompts are padded on the right. Causality keeps padding out of the prefill, and each later token
is written at its own row's length, over the padding.

Shape suffixes: B batch, T new tokens, S cached sequence, H query heads, K key/value heads,
E head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from matilda_model.config import ModelConfig


class LayerCache:
    """One layer's keys and values, [B, K, S, E], and how a query attends to them."""

    def __init__(self, owner: KVCache, k_BKSE: Tensor, v_BKSE: Tensor) -> None:
        self.owner = owner
        self.k_BKSE = k_BKSE
        self.v_BKSE = v_BKSE

    def attend(
        self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, window: int | None = None
    ) -> Tensor:
        """Store the new keys and values, then attend to everything up to each new token.

        In the cache's dtype; the result is in that of `q_BTHE`.
        """
        # under autocast what a projection gives has not the dtype that the cache was made for
        kind = self.k_BKSE.dtype
        q_BHTE, k_BKTE, v_BKTE = (x.to(kind).transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
        return self._attend(q_BHTE, k_BKTE, v_BKTE, window).transpose(1, 2).to(q_BTHE.dtype)

    def _attend(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, window: int | None) -> Tensor:
        gqa = q_BHTE.shape[1] != k_BKTE.shape[1]
        n_new = q_BHTE.shape[2]
        if self.owner.filled == 0:
            self.k_BKSE[:, :, :n_new] = k_BKTE
            self.v_BKSE[:, :, :n_new] = v_BKTE
            documents_BS = self.owner.documents_BS
            if window is None and documents_BS is None:
                return F.scaled_dot_product_attention(
                    q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=gqa
                )
            slots = self.owner.slots[:n_new]
            distance = slots[:, None] - slots[None, :]
            mask = distance >= 0
            if window is not None:
                mask = mask & (distance < window)
            if documents_BS is not None:
                of = documents_BS[:, None, :n_new]
                mask = mask & (of[..., None] == of[:, :, None, :])
            return F.scaled_dot_product_attention(
                q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, enable_gqa=gqa
            )
        index = self.owner.positions_B[:, None, None, None].expand(-1, k_BKTE.shape[1], 1, -1)
        index = index.expand(-1, -1, -1, k_BKTE.shape[3])
        self.k_BKSE.scatter_(2, index, k_BKTE)
        self.v_BKSE.scatter_(2, index, v_BKTE)
        used = self.owner.filled + 1
        return F.scaled_dot_product_attention(
            q_BHTE,
            self.k_BKSE[:, :, :used],
            self.v_BKSE[:, :, :used],
            attn_mask=self.owner.visible_B11S(window)[..., :used],
            enable_gqa=gqa,
        )


class KVCache:
    """The caches of all layers and the length of each row.

    Pass it to `Transformer.forward(ids, cache=...)`: first the prompts [B, T], then one token per
    row [B, 1] at a time; each call adds its tokens. `capacity` is the most tokens a row can have.
    Prompts of unequal length are padded on the right; after them call `keep(lengths_B)`, and each
    row goes on from its own end. Raises ValueError for a `capacity` that exceeds `max_seq_len`.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        if capacity > config.max_seq_len:
            raise ValueError(
                f"`capacity` {capacity!r} exceeds the model's `max_seq_len` {config.max_seq_len!r}"
            )
        shape = (batch, config.n_kv_heads, capacity, config.resolved_head_dim)
        self.capacity = capacity
        self.filled = 0  # longest row; a Python number, so that no step waits for the device
        self.positions_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.slots = torch.arange(capacity, device=device)
        self.documents_BS: Tensor | None = None
        if config.document_token is not None:
            self.documents_BS = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.layers = [
            LayerCache(
                self,
                torch.zeros(shape, device=device, dtype=dtype),
                torch.zeros(shape, device=device, dtype=dtype),
            )
            for _ in range(config.n_layers)
        ]

    def check_rows(self, rows: int) -> None:
        """Raises ValueError unless the cache was made for a batch of `rows`."""
        if rows != self.positions_B.shape[0]:
            raise ValueError(
                f"the cache holds {self.positions_B.shape[0]!r} rows and ids of {rows!r} are "
                "given: make it with this `batch`"
            )

    def next_positions(self, n_new: int) -> Tensor:
        """Positions of the next `n_new` tokens of every row, [B, n_new]."""
        if self.filled + n_new > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity!r} tokens and {self.filled + n_new!r} are asked "
                "for: make it with a larger `capacity`"
            )
        if self.filled == 0:
            return self.slots[:n_new].expand(self.positions_B.shape[0], -1)
        if n_new != 1:
            raise ValueError(
                f"after the prompt a cache takes one token per row at a time, not {n_new!r}"
            )
        return self.positions_B[:, None]

    def note_documents(self, input_ids_BT: Tensor, token: int) -> None:
        """Number the documents of the tokens that the next forward pass appends."""
        assert self.documents_BS is not None
        starts_BT = (input_ids_BT == token).long()
        if self.filled == 0:
            self.documents_BS[:, : starts_BT.shape[1]] = starts_BT.cumsum(1)
        else:
            here_B1 = self.positions_B[:, None]
            previous_B1 = self.documents_BS.gather(1, (here_B1 - 1).clamp_min(0))
            self.documents_BS.scatter_(1, here_B1, previous_B1 + starts_BT)

    def visible_B11S(self, window: int | None) -> Tensor:  # noqa: N802
        """Which slots each row's next token sees, bool [B, 1, 1, S]."""
        distance_BS = self.positions_B[:, None] - self.slots
        seen_BS = distance_BS >= 0
        if window is not None:
            seen_BS = seen_BS & (distance_BS < window)
        if self.documents_BS is not None:
            own_B1 = self.documents_BS.gather(1, self.positions_B[:, None])
            seen_BS = seen_BS & (self.documents_BS == own_B1)
        return seen_BS[:, None, None, :]

    def advance(self, n_new: int) -> None:
        """Count `n_new` tokens as cached; `Transformer` does."""
        self.filled += n_new
        self.positions_B = self.positions_B + n_new

    def keep(self, lengths_B: Tensor) -> None:
        """Of padded prompts, the true lengths: what was cached past them will be written over."""
        self.positions_B = lengths_B.to(self.positions_B)
