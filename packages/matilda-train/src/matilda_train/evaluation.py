"""Held-out loss in nats per token and in bits per byte, as a whole and by source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from matilda_data import BinStream, sources_of
from matilda_train.batches import BatchReader
from matilda_train.data_source import TokenStream
from matilda_train.distributed import Ranks

__all__ = ["Evaluation", "evaluate"]

NO_SOURCE = -1
"""Of windows that only fill up a batch."""


@dataclass(frozen=True)
class Evaluation:
    """Result over a fixed set of held-out windows."""

    val_loss_nats: float
    """Mean cross-entropy in nats per token, without z-loss."""

    val_bits_per_byte: float
    """Total cross-entropy in bits, end-of-text tokens included, over the text's UTF-8 bytes."""

    val_tokens: int
    """Tokens evaluated."""

    val_bits_per_byte_by_source: dict[str, float] = field(default_factory=dict)
    """The same of each source's tokens, as `matilda_data.sources_of` tells them apart; empty for
    noise. A source without a byte of text among the windows is left out."""

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

    As many as `max_tokens` holds, one at least, whatever the micro-batch and however many ranks
    share them. All micro-batches have one shape, which needs compiling once: the last are filled up
    with windows that count for nothing.
    `model(input_ids, targets, per_token=True)` must return the cross-entropy of each target, in
    nats and float32.
    """
    windows = max(1, min(stream.n_windows, max_tokens // seq_len))
    share = min(micro_batch_size, -(-windows // ranks.world_size))
    size = share * ranks.world_size
    names, sources = _sources(stream, windows, seq_len)

    def read_filled_up(first: int, count: int) -> NDArray[np.uint16]:
        rows = stream.windows(first, min(count, windows - first))
        return np.pad(rows, ((0, count - len(rows)), (0, 0)), mode="edge")

    reader = BatchReader(
        read_filled_up, batch_size=size, rank=ranks.rank, world_size=ranks.world_size
    )
    nats = torch.zeros(len(names), dtype=torch.float64, device=device)
    n_bytes = np.zeros(len(names), dtype=np.int64)
    was_training = model.training
    model.eval()
    try:
        for begin in range(0, windows, size):
            if ranks.any(should_stop()):
                return None
            batch = reader.read(begin, prefetch=begin + size < windows)
            first = begin + ranks.rank * share
            own = sources[first : first + share, 1:].astype(np.int64)
            own = np.pad(own, ((0, share - len(own)), (0, 0)), constant_values=NO_SOURCE)
            targets_bT = batch.tokens[:, 1:].numpy().view(np.uint16)
            for number in range(len(names)):
                n_bytes[number] += token_bytes[targets_bT[own == number]].sum()
            of_source = torch.from_numpy(own).to(device)
            for inputs, targets in batch.micro_batches(share, device):
                losses = model(inputs, targets, per_token=True).double()
                for number in range(len(names)):  # masked sums: the same bits every time
                    nats[number] += losses.masked_fill(of_source != number, 0.0).sum()
    finally:
        reader.close()
        model.train(was_training)
    totals = torch.cat([nats, torch.from_numpy(n_bytes).to(nats)])
    sums = (ranks.mean_(totals) * ranks.world_size).tolist()
    in_nats, in_bytes = sums[: len(names)], sums[len(names) :]
    return Evaluation(
        val_loss_nats=sum(in_nats) / (windows * seq_len),
        val_bits_per_byte=sum(in_nats) / math.log(2) / max(sum(in_bytes), 1.0),
        val_tokens=windows * seq_len,
        val_bits_per_byte_by_source={
            name: loss / math.log(2) / size_
            for name, loss, size_ in zip(names, in_nats, in_bytes, strict=True)
            if size_ > 0 and isinstance(stream, BinStream)
        },
    )


def _sources(
    stream: TokenStream, windows: int, seq_len: int
) -> tuple[list[str], NDArray[np.int16]]:
    """Names of sources, and which of them each token is of, [windows, seq_len + 1]."""
    if isinstance(stream, BinStream):
        return sources_of(stream, 0, windows)
    return [""], np.zeros((windows, seq_len + 1), dtype=np.int16)
