"""`Checkpointer`: save and restore anything that has a `state_dict`."""

from __future__ import annotations

import builtins
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from matilda_ckpt import strict_json
from matilda_ckpt.background import Background, SaveHandle
from matilda_ckpt.catalog import CheckpointInfo
from matilda_ckpt.errors import DamagedError, NoValidCheckpointError, SaveError
from matilda_ckpt.fs import Fs, OsFs
from matilda_ckpt.loading import load_names
from matilda_ckpt.manifest import Manifest, check_state_name
from matilda_ckpt.object_fs import object_url
from matilda_ckpt.reading import default_threads, load_from, load_state
from matilda_ckpt.restored import Restored, Skipped, give, unwrapped
from matilda_ckpt.retention import Keep
from matilda_ckpt.state_tree import Encoder
from matilda_ckpt.store import SHARE_BYTES, Part, SaveRequest, Store
from matilda_ckpt.strict_json import JSON

if TYPE_CHECKING:
    from matilda_ckpt.snapshot import HostPool, Snapshot

_LOG = logging.getLogger("matilda_ckpt")
MAX_STEP = 10**18 - 1
_SHARD_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}")


class Checkpointer:
    """Atomic, verified checkpoints in one directory, with one writer at a time.

    Args:
        root: directory of the checkpoints, created when missing, or the URL of a place in object
            storage (`s3://bucket/run`; needs `matilda-ckpt[s3]` or fsspec's package for it).
        keep: retention rule, applied after each durable save.
        run_id: identity written into every manifest (default: random).
        fs: file operations (default: the operating system's).
        threads: files written, hashed or read at the same time (default: one more than cores,
            at most 8).
        shard_bytes: a name's tensors are split into files of about this size, so that several
            cores can hash them.
        share_bytes: when at least this many bytes of a name did not change over the last saves,
            they share an older checkpoint's blocks (clone or hard link) instead of being written
            again; the two newest checkpoints never share with each other. None: never share.
        storage_options: for a URL: arguments of fsspec's client, for instance `endpoint_url`.
        read_only: never take the writer lock or move anything; `save` then raises ValueError.

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
        wait: bool = True,
    ) -> SaveHandle:
        """Write `state` as a new checkpoint of `step`; nothing existing is ever overwritten.

        Args:
            step: non-negative; a second save of the same step gets a name of its own.
            state: name → object with `state_dict()`, or nested dicts, lists and tuples of
                tensors, arrays and scalars.
            metrics: numbers that describe the checkpoint (used by `Keep.best`).
            provenance: JSON values to seal into the manifest (config hash, data id, …).
            healthy: False marks a state that `restore` must not pick by itself; a state with a
                NaN or infinite element is never healthy.
            wait: True returns when the checkpoint is durable and retention is done. False
                returns as soon as the state has been copied; the rest happens in threads, one
                save at a time, and an error is raised by the next `save`, `poll`, `finish` or
                by the handle.

        Raises SaveError when it could not be made durable (older checkpoints are untouched),
        LockedError when another process writes here, ValueError for a state that cannot be
        stored.
        """
        begun = time.monotonic()
        self._background.settle()
        self._check_arguments(step, state)
        snapshot = None if wait or not _has_tensors() else self._new_snapshot()
        request = self._request(step, state, snapshot, metrics or {}, provenance or {}, healthy)
        handle = SaveHandle(step)
        if wait:
            handle._end(self._commit(request, snapshot), None)
        else:
            # Only one writer can start: a refused lock must reach the caller at once.
            self._store.acquire()
            if snapshot is not None:
                snapshot.freeze()
            self._background.start(handle, lambda: self._commit(request, snapshot))
        handle.stall_s = time.monotonic() - begun
        return handle

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

    def _commit(self, request: SaveRequest, snapshot: Snapshot | None) -> CheckpointInfo:
        if snapshot is not None:
            try:
                snapshot.drain()
            except RuntimeError as error:
                raise SaveError(
                    f"the checkpoint of step {request.step} was not saved: its tensors could not "
                    f"be brought to the host: {error}; earlier checkpoints are untouched"
                ) from error
        info = self._store.save(request)
        try:
            self._store.retire(self.keep)
        except OSError as error:
            # The new checkpoint stands; what could not be deleted now is tried again next time.
            _LOG.warning("old checkpoints in `%s` could not be removed: %s", self.root, error)
        return info

    def _new_snapshot(self) -> Snapshot:
        from matilda_ckpt.snapshot import HostPool, Snapshot

        if self._pool is None:
            self._pool = HostPool()
        return Snapshot(self._pool)

    def _check_arguments(self, step: int, state: Mapping[str, object]) -> None:
        if self.read_only:
            raise ValueError(f"`{self.root}` was opened with `read_only=True`; it cannot save")
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise ValueError(f"`step` must be an integer from 0 to {MAX_STEP}, not {step!r}")
        if not state:
            raise ValueError("`state` is empty; give at least one name")

    def _request(
        self,
        step: int,
        state: Mapping[str, object],
        snapshot: Snapshot | None,
        metrics: Mapping[str, float],
        provenance: Mapping[str, JSON],
        healthy: bool,
    ) -> SaveRequest:
        names = [check_state_name(name) for name in state]
        if len({name.lower() for name in names}) != len(names):
            raise ValueError("two names of `state` differ only in case")
        for name in names:
            stem = _SHARD_NAME.fullmatch(name)
            if stem and stem[1] in state:
                raise ValueError(
                    f"state names {name!r} and {stem[1]!r} could use the same file; rename one"
                )
        numbers = {str(key): float(value) for key, value in metrics.items()}
        try:
            strict_json.dumps(dict(provenance))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`provenance` is not JSON: {error}") from error
        encoder = Encoder(snapshot)
        parts = []
        for name, value in state.items():
            encoded = encoder.encode(name, _state_of(value))
            tree = strict_json.dumps(encoded.tree, sort_keys=False)
            parts.append(Part(name, tree, encoded.tensors))

        watch = encoder.watch

        def finite() -> bool:
            return watch is None or watch.finite

        alive = self._background.alive
        return SaveRequest(
            step, parts, healthy, finite, numbers, dict(provenance), alive, self._shard_bytes
        )

    # -- restore -------------------------------------------------------------------------------

    def restore(self, into: Mapping[str, object], *, step: int | None = None) -> Restored | None:
        """Load the newest checkpoint that verifies and is healthy, or the one of `step`.

        Args:
            into: name → object with `load_state_dict`, or None to get plain data in
                `Restored.state` (as do names that are not mentioned). `RngState` objects are
                loaded last. No object is touched before every byte has been verified.
            step: exactly this step (its newest save), healthy or not; damage is then an error
                and nothing is moved.

        Damaged checkpoints are moved to `quarantine/` and the next older one is tried.
        Returns None only when the directory holds no checkpoint at all. Raises
        NoValidCheckpointError when some exist and none can be used, ValueError when a name or
        the step is not there.
        """
        self._background.settle()
        if not self.read_only and self._store.fs.entry(self._store.root) is not None:
            self._store.acquire()
        skipped: list[Skipped] = []
        for info in self._candidates(step):
            try:
                if info.problem is not None:
                    raise DamagedError(info.problem)
                if step is None and not info.healthy:
                    skipped.append(Skipped(info.name, info.step, "it is not healthy"))
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
                "`quarantine`; look at them with `matilda-ckpt verify`, or start again in an "
                "empty directory"
            )
        raise NoValidCheckpointError(
            f"`{self.root}` holds {len(skipped)} checkpoint(s) and none can be resumed from; "
            f"the newest, `{skipped[0].name}`: {skipped[0].reason}; look with `matilda-ckpt ls`, "
            "restore one by `step=`, or start again in an empty directory"
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
                raise ValueError(
                    f"checkpoint `{self.root / name}` holds no {wanted!r}; "
                    f"it holds {', '.join(sorted(manifest.state))}"
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

        Raises DamagedError, NoValidCheckpointError, SaveError, or ValueError when there is none.
        """
        if path_or_step is not None and not isinstance(path_or_step, int):
            return load_state(path_or_step, names=names)
        found = self._candidates(path_or_step)
        if path_or_step is None:
            found = [info for info in found if info.problem is None and info.healthy]
        if not found:
            raise NoValidCheckpointError(f"`{self.root}` holds no healthy checkpoint")
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
        self._store.acquire()
        return self._store.retire(keep or self.keep)

    def repair(self) -> builtins.list[Skipped]:
        """Verify every byte, quarantine what is damaged, clear what dead writers left."""
        self._background.settle()
        self._store.acquire()
        moved = []
        for info in self._store.scan():
            try:
                self._store.verify(info.name)
            except DamagedError as error:
                moved.append(self._set_aside(info, str(error)))
        return moved

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


def _has_tensors() -> bool:
    """Without torch in the process there is no tensor to freeze."""
    return "torch" in sys.modules


def _state_of(value: object) -> object:
    value = unwrapped(value)
    state_dict = getattr(value, "state_dict", None)
    return state_dict() if callable(state_dict) else value
