"""Held-out loss in nats per token and in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from matilda_train.batches import BatchReader
from matilda_train.data_source import TokenStream
from matilda_train.distributed import Ranks

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Result over a fixed set of held-out windows."""

    val_loss_nats: float
    """Mean cross-entropy in nats per token, without z-loss."""

    val_bits_per_byte: float
    """Total cross-entropy in bits, end-of-text tokens included, over the text's UTF-8 bytes."""

    val_tokens: int
    """Tokens evaluated."""

    def __str__(self) -> str:
        return (
            f"held-out loss {self.val_loss_nats:.4f} nats a token, "
            f"{self.val_bits_per_byte:.4f} bits a byte"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    stream: TokenStream,
    *,
    max_tokens: int,
    seq_len: int,
    micro_batch_size: int,
    token_bytes: NDArray[np.int32],
    device: torch.device,
    ranks: Ranks,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate the first windows of `stream`, the same ones each time; None if asked to stop.

    At most `max_tokens` tokens (at least one window a rank) in micro-batches of one fixed shape.
    `model(input_ids, targets)` must return an object with `ce`, the mean cross-entropy in nats.
    """
    windows = max(ranks.world_size, min(stream.n_windows, max_tokens // seq_len))
    share = max(1, min(micro_batch_size, windows // ranks.world_size))
    rounds = max(1, windows // (share * ranks.world_size))
    reader = BatchReader(
        stream.windows,
        batch_size=share * ranks.world_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    nats, n_bytes, tokens = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        for round_ in range(rounds):
            if ranks.any(should_stop()):
                return None
            batch = reader.read(round_ * share * ranks.world_size, prefetch=round_ + 1 < rounds)
            for inputs, targets in batch.micro_batches(share, device):
                nats += float(model(inputs, targets).ce) * targets.numel()
                n_bytes += int(token_bytes[targets.cpu().numpy()].sum())
                tokens += targets.numel()
    finally:
        reader.close()
        model.train(was_training)
    totals = torch.tensor([nats, n_bytes, tokens], dtype=torch.float64, device=device)
    nats, n_bytes, tokens = ranks.mean_(totals).tolist()
    return Evaluation(
        val_loss_nats=nats / tokens,
        val_bits_per_byte=nats / math.log(2) / max(n_bytes, 1),
        val_tokens=round(tokens * ranks.world_size),
    )
