"""Global batches of token windows on the device, read one step ahead by one thread."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
        self, micro_batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (input_ids_bT, targets_bT), int64 on `device`, for each micro-step in order."""
        for rows in torch.split(self.tokens, micro_batch_size):
            # int16 travels at half the bytes of int32; the mask undoes its sign.
            ids = rows.to(device, non_blocking=True).to(torch.int64) & 0xFFFF
            yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


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
        self._share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._pin_memory = pin_memory
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-reader")
        self._next: tuple[int, Future[Batch]] | None = None

    def read(self, first: int, *, prefetch: bool = True) -> Batch:
        """The global batch that begins at sample `first`."""
        if self._next is not None and self._next[0] == first:
            batch = self._next[1].result()
        else:
            batch = self._read(first)
        following = first + self._batch_size
        self._next = (following, self._thread.submit(self._read, following)) if prefetch else None
        return batch

    def close(self) -> None:
        """Stop the thread; a read in flight is waited for."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, first: int) -> Batch:
        windows = np.ascontiguousarray(self._read_windows(first, self._batch_size), dtype="<u2")
        digest = hashlib.sha256(windows.data).digest()
        tokens = torch.from_numpy(windows[self._share].view(np.int16))
        return Batch(tokens.pin_memory() if self._pin_memory else tokens, digest)


def chain_hash(previous: str, batch_sha256: bytes) -> str:
    """Hash of all batches consumed so far: SHA-256 of the previous hash and this batch's."""
    return hashlib.sha256(bytes.fromhex(previous) + batch_sha256).hexdigest()
