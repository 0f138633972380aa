"""A frozen copy of a training state, taken in milliseconds and written at leisure.

CUDA tensors are cloned on the device in the caller's stream (about a millisecond a gigabyte) and
then moved to pinned host memory by a side stream while training goes on; where the device has no
room for the clones, they are copied to pinned memory in the caller's stream instead. CPU tensors
are copied at once. Host memory is one pool, as large as the state and used again by the next save.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

BLOCK_BYTES = 32 << 20
_ALIGN = 64


class HostPool:
    """Host memory in blocks that are kept from save to save; pinned where CUDA is used."""

    def __init__(self) -> None:
        self._blocks: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        self._used = {True: (0, 0), False: (0, 0)}
        self._guard = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held now: the peak host memory of the snapshots."""
        return sum(len(blocks) for blocks in self._blocks.values()) * BLOCK_BYTES

    def reset(self) -> None:
        """Forget what the last snapshot put here."""
        self._used = {True: (0, 0), False: (0, 0)}

    def take(self, nbytes: int, *, pinned: bool) -> list[torch.Tensor]:
        """uint8 pieces that hold `nbytes` together, each but the last ending its block."""
        pieces = []
        with self._guard:
            blocks = self._blocks[pinned]
            index, offset = self._used[pinned]
            while nbytes > 0:
                if offset >= BLOCK_BYTES:
                    index, offset = index + 1, 0
                if index == len(blocks):
                    blocks.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned))
                size = min(nbytes, BLOCK_BYTES - offset)
                pieces.append(blocks[index][offset : offset + size])
                nbytes -= size
                offset += -(-size // _ALIGN) * _ALIGN
            self._used[pinned] = (index, offset)
        return pieces


@dataclass
class _Held:
    """One tensor of the snapshot."""

    nbytes: int
    clone: torch.Tensor | None
    pieces: list[torch.Tensor]

    def read(self) -> Iterator[memoryview]:
        for piece in self.pieces:
            yield piece.numpy().data


class Snapshot:
    """Frozen tensors of one save. `add` in the training thread, `drain` in the saving one."""

    def __init__(self, pool: HostPool) -> None:
        pool.reset()
        self._pool = pool
        self._held: list[_Held] = []
        self._ready: dict[torch.device, torch.cuda.Event] = {}
        self._room: dict[torch.device, int] = {}

    def add(self, tensor: torch.Tensor) -> Callable[[], Iterator[memoryview]]:
        """Freeze `tensor`; the returned function yields its bytes once `drain` has run."""
        value = tensor.detach().resolve_conj().resolve_neg()
        nbytes = value.numel() * value.itemsize
        held = _Held(nbytes, None, [])
        self._held.append(held)
        if nbytes == 0:
            return held.read
        if value.device.type == "cpu":
            held.pieces = self._pool.take(nbytes, pinned=False)
            _copy(value, held.pieces, non_blocking=False)
        elif value.device.type == "cuda" and not self._has_room(value.device, nbytes):
            held.pieces = self._pool.take(nbytes, pinned=True)
            _copy(value, held.pieces, non_blocking=True)
        else:
            held.clone = value.clone(memory_format=torch.contiguous_format)
        return held.read

    def seal(self) -> None:
        """Mark the point in every device's stream after which the state may change."""
        for device in self._room:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._ready[device] = event

    def drain(self) -> None:
        """Bring everything to the host; the training stream is not waited for by anything else."""
        streams = {
            device: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for device in self._ready
        }
        for device, stream in streams.items():
            stream.wait_event(self._ready[device])
        for held in self._held:
            if held.clone is None:
                continue
            clone = held.clone
            if clone.device.type == "cuda":
                held.pieces = self._pool.take(held.nbytes, pinned=True)
                with torch.cuda.stream(streams[clone.device]):
                    _copy(clone, held.pieces, non_blocking=True)
            else:
                held.pieces = self._pool.take(held.nbytes, pinned=False)
                _copy(clone, held.pieces, non_blocking=False)
        for stream in streams.values():
            stream.synchronize()
        for held in self._held:
            held.clone = None

    def _has_room(self, device: torch.device, nbytes: int) -> bool:
        """Whether the device can take one more clone without giving up cached memory."""
        if device not in self._room:
            free, _ = torch.cuda.mem_get_info(device)
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            self._room[device] = int(0.8 * (free + cached))
        self._room[device] -= nbytes
        return self._room[device] >= 0


def _copy(value: torch.Tensor, pieces: list[torch.Tensor], *, non_blocking: bool) -> None:
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    start = 0
    for piece in pieces:
        piece.copy_(flat[start : start + len(piece)], non_blocking=non_blocking)
        start += len(piece)
