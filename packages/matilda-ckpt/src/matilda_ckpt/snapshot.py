"""A frozen copy of a training state, taken in milliseconds and written at leisure.

CUDA tensors are gathered into one buffer a dtype on the device, in the caller's stream (about a
millisecond a gigabyte), and moved to pinned host memory by a side stream while training goes on;
where the device has no room for that, the caller's stream copies to the host instead. CPU tensors
are copied at once, or, where the caller promises to wait, by the saving thread (`deferred.py`).
Host memory is one pool, as large as the state and used again by the next save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from matilda_ckpt.deferred import Deferred, may_wait
from matilda_ckpt.errors import SaveError

BLOCK_BYTES = 32 << 20
_ALIGN = 64


class HostPool:
    """Host memory in blocks that are kept from save to save; pinned where CUDA is used."""

    def __init__(self) -> None:
        self._blocks: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        self._used = {True: 0, False: 0}

    @property
    def nbytes(self) -> int:
        """Bytes held now: the peak host memory of the snapshots."""
        return sum(len(blocks) for blocks in self._blocks.values()) * BLOCK_BYTES

    def reset(self) -> None:
        """Forget what the last snapshot put here."""
        self._used = {True: 0, False: 0}

    def take(self, nbytes: int, *, pinned: bool) -> Range:
        """Room for `nbytes`, somewhere in the blocks."""
        start = self._used[pinned]
        end = start + nbytes
        blocks = self._blocks[pinned]
        while len(blocks) * BLOCK_BYTES < end:
            blocks.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned))
        self._used[pinned] = -(-end // _ALIGN) * _ALIGN
        return Range(blocks, start, nbytes)


@dataclass(frozen=True)
class Range:
    """Bytes of a pool that may cross from block to block."""

    blocks: list[torch.Tensor]
    start: int
    nbytes: int

    def pieces(self, offset: int = 0, nbytes: int | None = None) -> Iterator[torch.Tensor]:
        """uint8 views that cover `nbytes` from `offset`, in order."""
        at = self.start + offset
        left = self.nbytes - offset if nbytes is None else nbytes
        while left > 0:
            block, inside = divmod(at, BLOCK_BYTES)
            size = min(left, BLOCK_BYTES - inside)
            yield self.blocks[block][inside : inside + size]
            at += size
            left -= size

    def fill(self, flat: torch.Tensor, offset: int = 0, *, non_blocking: bool = False) -> None:
        """Copy the uint8 vector `flat` to `offset`."""
        done = 0
        for piece in self.pieces(offset, flat.numel()):
            size = piece.numel()
            piece.copy_(flat[done : done + size], non_blocking=non_blocking)
            done += size


@dataclass
class _Group:
    """All tensors of one device and dtype, one after the other."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    nbytes: int = 0
    flat: torch.Tensor | None = None
    range: Range | None = None

    def read(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        assert self.range is not None
        for piece in self.range.pieces(offset, nbytes):
            yield piece.numpy().data


class Snapshot:
    """Frozen tensors of one save: `add` and `freeze` in the training thread, `copy` and `drain`
    in the saving one."""

    def __init__(self, pool: HostPool, step: int, *, defer: bool = False) -> None:
        """With `defer`, host tensors of some size may change only once `copy` and `settle` have
        run."""
        pool.reset()
        self._pool = pool
        self._step = step
        self._defer = defer
        self._groups: dict[tuple[torch.device, torch.dtype, bool], _Group] = {}
        self._ready: dict[torch.device, torch.cuda.Event] = {}
        self._deferred = Deferred()

    @property
    def pool_bytes(self) -> int:
        """Host memory held for snapshots."""
        return self._pool.nbytes

    def add(self, shown: str, tensor: torch.Tensor) -> Callable[[], Iterator[memoryview]]:
        """Note `tensor`; the returned function yields its frozen bytes once `drain` has run."""
        device = tensor.device
        key = (device, tensor.dtype, self._defer and may_wait(tensor))
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
        offset = group.nbytes
        nbytes = tensor.numel() * tensor.itemsize
        if nbytes:
            group.tensors.append(tensor)
            group.shown.append(shown)
            group.nbytes += nbytes
        return lambda: group.read(offset, nbytes)

    def freeze(self) -> None:
        """Copy everything but what waits; after this that may change, in the caller's stream."""
        with torch.no_grad():
            for (device, dtype, late), group in self._groups.items():
                if late:
                    group.range = self._pool.take(group.nbytes, pinned=False)
                    self._deferred.add(group.tensors, group.shown, group.range.fill)
                elif device.type == "cpu" and not self._defer:
                    self._freeze_on_host(group)
                else:
                    self._freeze_on_device(device, dtype, group)
                group.tensors = []
        for device in {device for device, _, _ in self._groups if device.type == "cuda"}:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._ready[device] = event

    def copy(self, alive: Callable[[], None]) -> None:
        """Copy the host tensors that `freeze` has left; `alive` may raise to end it."""
        with self._reporting():
            self._deferred.copy(alive)

    def settle(self) -> None:
        """The caller goes on to change its tensors: note whether it waited with that."""
        self._deferred.settle()

    def check(self) -> None:
        """Once everything is written: SaveError when a tensor was changed too early."""
        changed = self._deferred.changed()
        if changed is not None:
            raise SaveError(
                f"the checkpoint of step {self._step} was not saved: {changed} was changed before "
                "it was copied; after `save(…, defer_copy=True)` call `wait_copied()` before "
                "anything that was saved is changed, for instance right before the optimizer's "
                "step; earlier checkpoints are untouched"
            )

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """What torch says about memory and devices, as the error of this save."""
        try:
            yield
        except SaveError:
            raise
        except RuntimeError as error:
            raise SaveError(
                f"the checkpoint of step {self._step} was not saved: its tensors could not be "
                f"brought to the host: {error}; earlier checkpoints are untouched"
            ) from error

    def drain(self) -> None:
        """Bring everything to the host without holding up the training stream."""
        with self._reporting():
            self._drain()

    def _drain(self) -> None:
        for (device, _, _), group in self._groups.items():
            if group.flat is None:
                continue
            group.range = self._pool.take(group.nbytes, pinned=device.type == "cuda")
            if device.type != "cuda":
                group.range.fill(group.flat)
                group.flat = None
        streams = {
            device: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for device in self._ready
        }
        for device, stream in streams.items():
            stream.wait_event(self._ready[device])
            with torch.cuda.stream(stream):
                for (where, _, _), group in self._groups.items():
                    if where == device and group.flat is not None and group.range is not None:
                        group.range.fill(group.flat, non_blocking=True)
        for stream in streams.values():
            stream.synchronize()
        for group in self._groups.values():
            group.flat = None

    def _freeze_on_host(self, group: _Group) -> None:
        group.range = self._pool.take(group.nbytes, pinned=False)
        offset = 0
        for tensor in group.tensors:
            flat = _bytes_of(tensor)
            group.range.fill(flat, offset)
            offset += flat.numel()

    def _freeze_on_device(self, device: torch.device, dtype: torch.dtype, group: _Group) -> None:
        if device.type == "cuda" and not _has_room(device, group.nbytes):
            group.range = self._pool.take(group.nbytes, pinned=True)
            offset = 0
            for tensor in group.tensors:
                flat = _bytes_of(tensor)
                group.range.fill(flat, offset, non_blocking=True)
                offset += flat.numel()
            return
        sizes = [tensor.numel() for tensor in group.tensors]
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        if sizes:
            sources = [_resolved(tensor).reshape(-1) for tensor in group.tensors]
            torch._foreach_copy_(list(torch.split(flat, sizes)), sources)
        group.flat = flat.view(torch.uint8)


def _resolved(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_complex() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return _resolved(tensor).contiguous().reshape(-1).view(torch.uint8)


def _has_room(device: torch.device, nbytes: int) -> bool:
    """Whether the device can take a copy of `nbytes` without giving up cached memory."""
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return nbytes < 0.8 * (free + cached)
