"""`Checkpointer`: save and restore anything that has a `state_dict`."""

from __future__ import annotations

import builtins
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from matilda_ckpt.background import Background, SaveHandle
from matilda_ckpt.catalog import CheckpointInfo
from matilda_ckpt.errors import (
    CheckpointError,
    DamagedError,
    NoValidCheckpointError,
    OtherFormatError,
    UnreadableError,
)
from matilda_ckpt.fs import Fs, OsFs
from matilda_ckpt.loading import load_names
from matilda_ckpt.manifest import Manifest
from matilda_ckpt.object_fs import object_url
from matilda_ckpt.reading import SHARDED, SHARDED_NAME, default_threads, load_from, load_state
from matilda_ckpt.restored import Restored, Skipped, give
from matilda_ckpt.retention import Keep, check_keep
from matilda_ckpt.save_request import check_mapping, save_request, state_of
from matilda_ckpt.state_tree import Encoder
from matilda_ckpt.store import SHARE_BYTES, SaveRequest, Store
from matilda_ckpt.strict_json import JSON

if TYPE_CHECKING:
    from matilda_ckpt.snapshot import HostPool, Snapshot

_LOG = logging.getLogger("matilda_ckpt")


class Checkpointer:
    """Atomic, verified checkpoints in one directory, with one writer at a time.

    Args:
        root: directory of the checkpoints, created when missing, or the URL of a place in object
            storage (`s3://bucket/run`; needs `matilda-ckpt[s3]` or fsspec's package for it).
        keep: retention rule, applied after each durable save.
        run_id: identity written into every manifest, at most 256 characters (default: random).
        fs: file operations (default: the operating system's).
        threads: files written, hashed or read at the same time (default: one more than cores,
            at most 8).
        shard_bytes: a name's tensors are split into files of about this size, so that several
            cores can hash them.
        share_bytes: when at least this many bytes of a name did not change over the last saves,
            they share an older checkpoint's blocks (clone or hard link) instead of being written
            again; the two newest checkpoints never share with each other. None: never share.
        storage_options: for a URL: arguments of fsspec's client, for instance `endpoint_url`.
        read_only: never take the writer lock or change anything; `save`, `retire` and `repair` then
            raise ValueError.

    The writer lock is taken by the first `save` or `restore` and released by `close()`, by
    garbage collection, or by the kernel when the process dies.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        keep: Keep = Keep(last=3),  # noqa: B008 (frozen)
        run_id: str | None = None,
        fs: Fs | None = None,
        threads: int | None = None,
        shard_bytes: int = 256 << 20,
        share_bytes: int | None = SHARE_BYTES,
        read_only: bool = False,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        check_keep(keep)
        threads = default_threads() if threads is None else threads
        if threads < 1 or shard_bytes < 1:
            raise ValueError("`threads` and `shard_bytes` must be positive")
        self.keep = keep
        self.run_id = run_id if run_id is not None else secrets.token_hex(8)
        self.read_only = read_only
        self._shard_bytes = shard_bytes
        self._background = Background()
        self._pool: HostPool | None = None
        url = object_url(root)
        self.root = Path(os.path.abspath(root) if url is None else url)  # noqa: PTH100
        self._store: Store
        if url is not None:
            from matilda_ckpt.object_store import ObjectStore

            self._store = ObjectStore(
                url, run_id=self.run_id, threads=threads, storage_options=storage_options
            )
        else:
            self._store = Store(
                fs or OsFs(),
                str(self.root),
                run_id=self.run_id,
                threads=threads,
                share_bytes=share_bytes,
            )

    # -- save ----------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: Mapping[str, object],
        *,
        metrics: Mapping[str, float] | None = None,
        provenance: Mapping[str, JSON] | None = None,
        healthy: bool = True,
        nonfinite: Literal["mark", "refuse"] = "mark",
        wait: bool = True,
        defer_copy: bool = False,
    ) -> SaveHandle:
        """Write `state` as a new checkpoint of `step`; nothing existing is ever overwritten.

        Args:
            step: non-negative; a second save of the same step gets a name of its own.
            state: name → object with `state_dict()`, or nested dicts, lists and tuples of
                tensors, arrays and scalars.
            metrics: numbers that describe the checkpoint (used by `Keep.best`).
            provenance: JSON values to seal into the manifest (config hash, data id, …).
            healthy: False marks a state that `restore` must not pick by itself.
            nonfinite: what becomes of a state with a NaN or infinite element: "mark" saves it as
                evidence, never healthy; "refuse" saves nothing and is a NotFiniteError.
            wait: True returns when the checkpoint is durable and retention is done. False
                returns as soon as the state has been copied; the rest happens in threads, one
                save at a time, and an error is raised by the next `save`, `poll`, `finish` or
                by the handle.
            defer_copy: with `wait=False`, return even before host tensors are copied; call
                `wait_copied()` before you change any of them. CUDA tensors, arrays, tensors
                under 4 KiB or not contiguous, and what is no tensor are still taken at once.

        Raises SaveError when it was not made durable (older checkpoints are untouched),
        LockedError when another process writes here, ValueError for a state that cannot be
        stored.
        """
        begun = time.monotonic()
        self._background.settle()
        self._check_may_write("save")
        if nonfinite not in ("mark", "refuse"):
            raise ValueError(f"`nonfinite` must be 'mark' or 'refuse', not {nonfinite!r}")
        # Without torch in the process there is no tensor to freeze.
        snapshot = None
        if not wait and "torch" in sys.modules:
            snapshot = self._new_snapshot(step, defer_copy)
        encoder = Encoder(snapshot, copy_arrays=not wait)
        request = save_request(
            step,
            state,
            encoder,
            metrics=metrics or {},
            provenance=provenance or {},
            healthy=healthy,
            alive=self._background.alive,
            shard_bytes=self._shard_bytes,
            finite_only=nonfinite == "refuse",
        )
        handle = SaveHandle(step)
        if wait:
            encoder.wait_for_devices()
            handle._end(self._commit(request), None)
        else:
            # Only one writer can start: a refused lock must reach the caller at once.
            self._store.acquire()
            self._start(request, handle, snapshot)
        handle.stall_s = time.monotonic() - begun
        return handle

    def wait_copied(self) -> None:
        """After `save(…, wait=False, defer_copy=True)`: return once what was saved may change.

        Call it right before the optimizer's step; it returns at once when nothing is being
        copied. It raises nothing: after a copy or a save that failed or was abandoned the caller
        goes on too, and the error is raised where those of background saves are.

        A tensor that was changed before this returned makes that save a SaveError, never a
        checkpoint. It is noticed by the tensor's version counter, and for writers that leave the
        counter alone (`fused=True` optimizers on the CPU, numpy views, `.data`, custom kernels)
        by 16 elements spread over it: such a writer that misses all of those is not noticed.
        """
        self._background.wait_copied()

    def reserve(self, state: Mapping[str, object]) -> int:
        """Set aside now the host memory of a background save of `state`; returns its bytes.

        Optional, once everything in `state` exists, for instance after the first step of training.
        The first `save(…, wait=False)` otherwise pins memory beside the steps that follow it, and
        CUDA launches nothing meanwhile (about 0.5 s for 1.4 GB). Copies the state once, for what
        CUDA loads and allocates at a first use, and writes nothing to disk.

        Raises ValueError for a state that cannot be stored, SaveError when it cannot be brought to
        the host.
        """
        self._background.settle()
        if "torch" not in sys.modules:
            return 0
        snapshot = self._new_snapshot(0, defer=False)
        encoder = Encoder(snapshot)
        for name, value in state.items():
            encoder.encode(name, state_of(value))
        snapshot.freeze()
        snapshot.drain()
        return snapshot.pool_bytes

    def poll(self) -> bool:
        """True when no save is in flight; raises the SaveError of one that failed unseen."""
        return self._background.poll()

    def finish(self, deadline_s: float | None = None) -> CheckpointInfo | None:
        """Wait for the save in flight, for instance on SIGTERM.

        After `deadline_s` seconds it is abandoned: SaveError is raised, its temporary files go
        away with it or at the next start, and older checkpoints stand. Returns what became
        durable, or None when nothing was in flight.
        """
        return self._background.finish(deadline_s)

    def _start(self, request: SaveRequest, handle: SaveHandle, snapshot: Snapshot | None) -> None:
        """Freeze what must be frozen now, and leave the rest to a thread."""
        if snapshot is None:
            self._background.start(handle, lambda: None, lambda: self._commit(request))
            return
        snapshot.freeze()
        handle._settle = snapshot.settle
        sealed = replace(request, intact=snapshot.check)

        def commit() -> CheckpointInfo:
            snapshot.drain()
            return self._commit(sealed)

        self._background.start(handle, lambda: snapshot.copy(request.alive), commit)

    def _commit(self, request: SaveRequest) -> CheckpointInfo:
        info = self._store.save(request)
        try:
            self._store.retire(self.keep)
        except OSError as error:
            # The new checkpoint stands; what could not be deleted now is tried again next time.
            _LOG.warning("old checkpoints in `%s` could not be removed: %s", self.root, error)
        return info

    def _new_snapshot(self, step: int, defer: bool) -> Snapshot:
        from matilda_ckpt.snapshot import HostPool, Snapshot

        if self._pool is None:
            self._pool = HostPool()
        return Snapshot(self._pool, step, defer=defer)

    # -- restore -------------------------------------------------------------------------------

    def restore(
        self,
        into: Mapping[str, object],
        *,
        step: int | None = None,
        accept: Callable[[CheckpointInfo], bool] | None = None,
    ) -> Restored | None:
        """Load the newest checkpoint that verifies and is healthy, or the one of `step`.

        Args:
            into: name → object with `load_state_dict`, or None to get plain data in
                `Restored.state` (as do names that are not mentioned). `RngState` objects are
                loaded last. No object is touched before every byte has been verified.
            step: exactly this step (its newest save), healthy or not; damage is then an error
                and nothing is moved.
            accept: without a `step`: passes over every checkpoint for which it is false, such as
                those that a rollback undid; they stay where they are.

        Damaged checkpoints are moved to `quarantine/` and the next older one is tried. One that
        another version of the format wrote is an OtherFormatError, one that the system refuses to
        read an UnreadableError; they stay. Returns None only when the directory holds no checkpoint
        at all. Raises NoValidCheckpointError when some exist and none can be used, ValueError when
        a name or the step is not there.
        """
        check_mapping("into", into)
        self._background.settle()
        if not self.read_only and self._store.fs.entry(self._store.root) is not None:
            self._store.acquire()
        skipped: list[Skipped] = []
        for info in self._candidates(step):
            try:
                if info.problem is not None:
                    raise _problem_of(info)
                if step is None and not info.healthy:
                    skipped.append(Skipped(info.name, info.step, "it is not healthy"))
                    continue
                if step is None and accept is not None and not accept(info):
                    skipped.append(Skipped(info.name, info.step, "the caller did not accept it"))
                    continue
                loaded = self._load(info.name, into)
            except DamagedError as error:
                if step is not None:
                    raise
                skipped.append(self._set_aside(info, str(error)))
                continue
            return give(info, loaded, into, skipped)
        if not skipped:
            quarantined = self._store.quarantined()
            if not quarantined:
                return None
            raise NoValidCheckpointError(
                f"`{self.root}` holds no checkpoint any more, only {len(quarantined)} damaged in "
                f"`quarantine`; {self._anew()}"
            )
        moved = sum(skip.moved_to is not None for skip in skipped)
        raise NoValidCheckpointError(
            f"`{self.root}` held {len(skipped)} checkpoint(s) and none can be resumed from; "
            f"the newest, `{skipped[0].name}`: {skipped[0].reason}; "
            + (
                f"{moved} damaged lie in `quarantine` now: {self._anew()}"
                if moved
                else "look with `matilda-ckpt ls`, take one by its step (`--step`, in Python "
                "`step=`), or start anew in an empty directory"
            )
        )

    def _anew(self) -> str:
        return (
            f"put an intact copy, even an older one, back into `{self.root}`, or start anew in an "
            "empty directory, such as a new `--run-dir`"
        )

    def _candidates(self, step: int | None) -> list[CheckpointInfo]:
        found = self._store.scan()
        if step is None:
            return found
        matching = [info for info in found if info.step == step]
        if not matching:
            have = ", ".join(str(s) for s in sorted({info.step for info in found})) or "none"
            raise ValueError(f"`{self.root}` has no checkpoint of step {step!r}; it has: {have}")
        return matching[:1]

    def _load(self, name: str, into: Mapping[str, object]) -> tuple[Manifest, dict[str, object]]:
        manifest, _ = self._store.open(name)
        for wanted in into:
            if wanted not in manifest.state:
                why = (
                    "another version of the program wrote it: go on with that one, or start anew "
                    "in another directory"
                )
                raise ValueError(
                    f"checkpoint `{self.root / name}` holds no {wanted!r}; it holds "
                    f"{', '.join(sorted(manifest.state))}; "
                    f"{SHARDED if SHARDED_NAME in manifest.state else why}"
                )
        return manifest, load_names(self._store, name, manifest, list(manifest.state))

    def _set_aside(self, info: CheckpointInfo, reason: str) -> Skipped:
        moved = None if self.read_only else Path(self._store.quarantine(info.name, reason))
        return Skipped(info.name, info.step, reason, moved)

    def load_state(
        self,
        path_or_step: str | os.PathLike[str] | int | None = None,
        *,
        names: Collection[str] | None = None,
    ) -> dict[str, object]:
        """Plain nested data of one checkpoint, without objects, lock or quarantine.

        Args:
            path_or_step: a checkpoint directory, a step, or None for the newest healthy one.
            names: only these names (their files alone are read and verified).

        Raises DamagedError, OtherFormatError, UnreadableError or NoValidCheckpointError, ValueError
        when the step or a name is not there.
        """
        if path_or_step is not None and not isinstance(path_or_step, int):
            return load_state(path_or_step, names=names)
        found = self._candidates(path_or_step)
        if found and (found[0].other_format or found[0].unreadable):
            raise _problem_of(found[0])
        newest = found[0] if found else None
        if path_or_step is None:
            found = [info for info in found if info.problem is None and info.healthy]
        if not found:
            why = f"; the newest: {newest.problem or 'it is not healthy'}" if newest else ""
            raise NoValidCheckpointError(f"`{self.root}` holds no healthy checkpoint{why}")
        return load_from(self._store, found[0].name, names)

    # -- look ----------------------------------------------------------------------------------

    def list(self) -> list[CheckpointInfo]:
        """Every checkpoint, newest first: names, sizes and seals checked, contents not."""
        return self._store.scan()

    def scan(self) -> builtins.list[CheckpointInfo]:
        """The same as `list()`."""
        return self._store.scan()

    def retire(self, keep: Keep | None = None) -> builtins.list[str]:
        """Delete what the rule (default: this checkpointer's) does not keep; returns the names."""
        self._background.settle()
        self._check_may_write("delete")
        self._store.acquire()
        return self._store.retire(keep or self.keep)

    def repair(self) -> builtins.list[Skipped]:
        """Verify every byte, quarantine what is damaged, clear what dead writers left.

        Returns what was moved, and without a `moved_to` what stays because it could not be judged:
        another version of the format wrote it, or the system refuses to read it.
        """
        self._background.settle()
        self._check_may_write("repair")
        self._store.acquire()
        found = []
        for info in self._store.scan():
            try:
                self._store.verify(info.name)
            except DamagedError as error:
                found.append(self._set_aside(info, str(error)))
            except (OtherFormatError, UnreadableError) as error:
                found.append(Skipped(info.name, info.step, str(error)))
        return found

    def _check_may_write(self, what: str) -> None:
        if self.read_only:
            raise ValueError(f"`{self.root}` was opened with `read_only=True`; it cannot {what}")

    # -- end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for the save in flight (raising its error) and release the writer lock."""
        try:
            self._background.settle()
        finally:
            self._store.release()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _problem_of(info: CheckpointInfo) -> CheckpointError:
    """What opening it said."""
    kind: type[CheckpointError] = DamagedError
    if info.other_format:
        kind = OtherFormatError
    elif info.unreadable:
        kind = UnreadableError
    return kind(info.problem)
