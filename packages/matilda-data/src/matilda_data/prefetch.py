"""Batches read ahead by one thread into a ring of buffers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from matilda_data.errors import DataError
from matilda_data.stream import BinStream

__all__ = ["Prefetcher"]

TokenArray = npt.NDArray[np.uint16]


class Prefetcher:
    """Iterates over this rank's share of global batches, read ahead by one thread.

    No worker processes, no shared memory. Only handing a batch out advances `stream.next_sample`
    (by the global `batch_size`), so the stream's state never counts what is merely in flight; when
    the stream is moved (`load_state_dict`), what was read ahead is dropped.

        with Prefetcher(stream, batch_size=64, rank=1, world_size=4) as batches:
            for tokens in batches:  # uint16[16, seq_len + 1]
                ...

    A batch's buffer is used again after `depth` further batches. For pinned memory pass
    `make_buffer=lambda shape: torch.empty(shape, dtype=torch.uint16, pin_memory=True).numpy()`.

    Args:
        stream: where samples come from and whose position counts.
        batch_size: samples of a global batch, a multiple of `world_size`.
        rank, world_size: this process gets samples [rank, rank + 1) × batch_size / world_size.
        depth: batches read ahead.
        make_buffer: makes a uint16 array of a shape; None for plain memory.
    """

    def __init__(
        self,
        stream: BinStream,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        depth: int = 2,
        make_buffer: Callable[[tuple[int, int]], TokenArray] | None = None,
    ) -> None:
        if not 0 <= rank < world_size <= batch_size or batch_size % world_size or depth < 1:
            raise DataError(
                f"cannot share batches of {batch_size} as rank {rank} of {world_size} with depth "
                f"{depth}; make `batch_size` a multiple of `world_size`, 0 ≤ rank < world_size"
            )
        self.stream = stream
        self.batch_size = batch_size
        self._share = batch_size // world_size
        self._offset = rank * self._share
        self._depth = depth
        shape = (self._share, stream.seq_len + 1)
        make = make_buffer or (lambda shape: np.empty(shape, dtype=np.uint16))
        self._buffers = [make(shape) for _ in range(2 * depth + 1)]
        self._turn = 0  # batches handed out; what is dropped when the stream moves does not count
        self._reader: _Reader | None = None

    def __iter__(self) -> Iterator[TokenArray]:
        return self

    def __next__(self) -> TokenArray:
        """The next batch: uint16[batch_size / world_size, seq_len + 1].

        Raises:
            DataError: what reading it ran into.
        """
        first = self.stream.next_sample
        if self._reader is None or self._reader.position != first:
            self.close()
            self._reader = _Reader(self, first)
        tokens = self._reader.get()
        self.stream.next_sample = first + self.batch_size
        return tokens

    def state_dict(self) -> dict[str, Any]:
        """The stream's: what was handed out, not what is in flight."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            DataError: as `BinStream.load_state_dict`.
        """
        self.stream.load_state_dict(state)

    def close(self) -> None:
        """Stop reading ahead; iterating again starts at `stream.next_sample`."""
        if self._reader is not None:
            self._reader.stop()
            self._reader = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Reader:
    """The thread, reading from sample `first` on until stopped."""

    def __init__(self, owner: Prefetcher, first: int) -> None:
        self.position = first
        self._owner, self._turn = owner, owner._turn
        self._ready: queue.Queue[TokenArray | BaseException] = queue.Queue(owner._depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="matilda-data-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        owner, first, turn = self._owner, self.position, self._turn
        while not self._stopping.is_set():
            # Ready, being read and handed out never exceed 2 × depth + 1 buffers.
            buffer = owner._buffers[turn % len(owner._buffers)]
            turn += 1
            try:
                item: TokenArray | BaseException = owner.stream.windows(
                    first + owner._offset, owner._share, out=buffer
                )
            except BaseException as error:
                item = error
            self._ready.put(item)
            if isinstance(item, BaseException):
                return
            first += owner.batch_size

    def get(self) -> TokenArray:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # asking again gives the same answer
            raise item
        self.position += self._owner.batch_size
        self._owner._turn += 1
        return item

    def stop(self) -> None:
        self._stopping.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()
