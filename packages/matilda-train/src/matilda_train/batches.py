"""Global batches of token windows on the device, read one step ahead by one thread."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Batch", "BatchReader", "chain_hash"]

# B sequences of a global batch, b of one micro-step, T tokens a sequence.

WindowReader = Callable[[int, int], NDArray[np.uint16]]


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, with the identity of the whole."""

    tokens: Tensor
    """int16 view of uint16 tokens, [B / world_size, T + 1], in pinned memory for a GPU."""

    sha256: bytes
    """SHA-256 of the global batch's tokens in order, as little-endian uint16."""

    def micro_batches(
        self, micro_batch_size: int, device: torch.device, *, seq_len: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (input_ids_bT, targets_bT), int64 on `device`, for each micro-step in order.

        With a `seq_len` that divides T, every sequence is cut into T / seq_len: the same tokens and
        targets in the same order, [b · T / seq_len, seq_len].
        """
        for rows in torch.split(self.tokens, micro_batch_size):
            # int16 travels at half the bytes of int32; the mask undoes its sign.
            ids = rows.to(device, non_blocking=True).to(torch.int64) & 0xFFFF
            length = seq_len or ids.shape[1] - 1
            yield ids[:, :-1].reshape(-1, length), ids[:, 1:].reshape(-1, length)


class BatchReader:
    """Reads the global batch at any position; the one after it is prefetched meanwhile.

    `read_windows(first, count)` returns uint16[count, T + 1] and must be a pure function, so what
    was prefetched and never used is simply forgotten.
    """

    def __init__(
        self,
        read_windows: WindowReader,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._read_windows = read_windows
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._pin_memory = pin_memory
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-reader")
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None

    def read(
        self,
        first: int,
        batch_size: int | None = None,
        *,
        following: int | None = None,
        prefetch: bool = True,
    ) -> Batch:
        """The global batch that begins at sample `first`.

        `batch_size` is its number of samples and `following` that of the batch after it, where they
        are not the reader's own.
        """
        wanted = (first, batch_size or self._batch_size)
        if self._next is not None and self._next[0] == wanted:
            batch = self._next[1].result()
        else:
            batch = self._read(*wanted)
        after = (first + wanted[1], following or self._batch_size)
        self._next = (after, self._thread.submit(self._read, *after)) if prefetch else None
        return batch

    def forget(self) -> None:
        """Wait for the read in flight and drop what it brings: the samples are about to change."""
        if self._next is not None:
            wait([self._next[1]])
        self._next = None

    def close(self) -> None:
        """Stop the thread; a read in flight is waited for."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, first: int, batch_size: int) -> Batch:
        windows = np.ascontiguousarray(self._read_windows(first, batch_size), dtype="<u2")
        digest = hashlib.sha256(windows.data).digest()
        begin, end = (batch_size * r // self._world_size for r in (self._rank, self._rank + 1))
        tokens = torch.from_numpy(windows[begin:end].view(np.int16))
        return Batch(tokens.pin_memory() if self._pin_memory else tokens, digest)


def chain_hash(previous: str, batch_sha256: bytes) -> str:
    """Hash of all batches consumed so far: SHA-256 of the previous hash and this batch's."""
    return hashlib.sha256(bytes.fromhex(previous) + batch_sha256).hexdigest()
