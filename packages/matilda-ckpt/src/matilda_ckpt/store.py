"""The commit protocol: how a checkpoint becomes durable, is found again, and goes away.

    lock and fence → unique temporary directory → reserve space → write and hash, fsync each file
    → MANIFEST.json, fsync → COMMIT, fsync → fsync directory → rename without replacing
    → fsync parent → acknowledged → only now retention.

Files whose tensors did not change may share the blocks of an older checkpoint (`sharing.py`).

Nothing here imports torch: every byte goes through an `Fs`, so that tests can crash it anywhere.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from matilda_ckpt import strict_json
from matilda_ckpt.catalog import (
    QUARANTINE_NAME,
    Catalog,
    CheckpointInfo,
    info_of,
    parse_name,
    reason_of,
)
from matilda_ckpt.errors import (
    CheckpointError,
    DamagedError,
    NotFiniteError,
    SaveError,
    UnreadableError,
)
from matilda_ckpt.fs import Entry, Fs, WriteFile, remove_tree
from matilda_ckpt.manifest import (
    COMMIT_NAME,
    MANIFEST_NAME,
    Commit,
    FileEntry,
    Manifest,
    StateEntry,
    check_run_id,
    sealed,
)
from matilda_ckpt.parallel import each
from matilda_ckpt.retention import MIN_KEPT, Keep, victims
from matilda_ckpt.sharing import Before, look_back, plan_files, share
from matilda_ckpt.strict_json import JSON
from matilda_ckpt.tensor_file import (
    TensorFilePlan,
    TensorSource,
    write_bytes_file,
    write_tensor_file,
)
from matilda_ckpt.writer_lock import TEMP_PREFIX, TRASH_PREFIX, WriterLock

SPARE_BYTES = 1 << 20
"""Room for manifest, directory blocks and rounding that the preflight asks for on top."""
SHARE_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """One name of the saved state: its JSON and its tensors."""

    name: str
    json: bytes
    tensors: Sequence[TensorSource]


@dataclass
class Draft:
    """A checkpoint on its way: written under `temp`, to be called `name`."""

    name: str
    temp: str
    published: bool = False


@dataclass(frozen=True)
class SaveRequest:
    step: int
    parts: Sequence[Part]
    healthy: bool
    finite: Callable[[], bool]
    """Asked after the data is written."""
    metrics: Mapping[str, float]
    provenance: Mapping[str, JSON]
    alive: Callable[[], None] = lambda: None
    """Called between chunks and right before the name is published; raises to abandon the save."""
    shard_bytes: int = 256 << 20
    """Tensors of one name go into files of about this size."""
    intact: Callable[[], None] = lambda: None
    """Called after the data is written; raises when it is not what was to be saved."""
    finite_only: bool = False
    """Publish nothing that is not finite."""

    def check(self) -> None:
        """After the data is written: raises when it must not be published."""
        self.intact()
        if self.finite_only and not self.finite():
            raise NotFiniteError(
                f"the state of step {self.step} holds NaN or infinity and was not saved; earlier "
                "checkpoints are untouched"
            )


class Store(Catalog):
    """One checkpoint directory. Not thread-safe: one caller at a time.

    `share_bytes`: unchanged tensors of a name are shared from this size on; None: never.
    """

    def __init__(
        self,
        fs: Fs,
        root: str,
        *,
        run_id: str,
        threads: int = 1,
        share_bytes: int | None = SHARE_BYTES,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        nonce: Callable[[], str] = lambda: secrets.token_hex(4),
    ) -> None:
        super().__init__(fs, root, threads=threads)
        self.run_id = check_run_id(run_id)
        self.share_bytes = share_bytes
        self._now = now
        self._nonce = nonce
        self._lock = WriterLock(fs, root, run_id)
        self._verified: dict[str, tuple[Entry, ...]] = {}

    def acquire(self) -> None:
        """Become the only writer; LockedError, or CheckpointError where nothing can be written."""
        try:
            self._lock.acquire()
        except OSError as error:
            raise CheckpointError(
                f"`{self.root}` cannot be written: {reason_of(error)}; "
                "open it with `read_only=True` to only read"
            ) from error

    def release(self) -> None:
        self._lock.release()

    # -- save ----------------------------------------------------------------------------------

    def save(self, request: SaveRequest) -> CheckpointInfo:
        """Returns only when the checkpoint is durable; SaveError leaves the others untouched."""
        with self.reporting(request.step):
            draft = self.begin(request.step)
            with self.discarding(draft):
                files, state = self._write_all(draft.temp, request)
                request.check()
                return self.finish(draft, request, files, state)

    @contextmanager
    def reporting(self, step: int) -> Iterator[None]:
        """Turns operating system errors into SaveErrors."""
        try:
            yield
        except OSError as error:
            raise SaveError(
                f"the checkpoint of step {step} was not saved to `{self.root}`: "
                f"{reason_of(error)}; earlier checkpoints are untouched"
            ) from error

    @contextmanager
    def discarding(self, draft: Draft) -> Iterator[None]:
        """Removes the draft, under whichever name it has reached, when anything fails."""
        try:
            yield
        except BaseException:
            self.discard(draft)
            raise

    def discard(self, draft: Draft) -> None:
        """Remove a draft that was not acknowledged; best effort."""
        self._discard(draft.temp)
        if draft.published:
            # Visible but not durable: it must not be counted by anyone.
            self._discard(f"{self.root}/{draft.name}")

    def begin(self, step: int) -> Draft:
        """Lock, choose a free name and make the temporary directory."""
        self._lock.acquire()
        name = self._free_name(step)
        draft = Draft(name, f"{self.root}/{TEMP_PREFIX}{name}-{self._nonce()}")
        self.fs.mkdir(draft.temp)
        return draft

    def finish(
        self,
        draft: Draft,
        request: SaveRequest,
        files: Mapping[str, FileEntry],
        state: Mapping[str, StateEntry],
    ) -> CheckpointInfo:
        """Seal and publish a draft whose files are written and fsynced."""
        manifest, data, commit = self._seal(draft, request, files, state)
        self.write_text(draft, MANIFEST_NAME, data)
        self.write_text(draft, COMMIT_NAME, commit.to_bytes())
        self.fs.fsync_dir(draft.temp)
        request.alive()
        self._lock.check()
        self.fs.rename_noreplace(draft.temp, f"{self.root}/{draft.name}")
        draft.published = True
        self.fs.fsync_dir(self.root)
        self._verified[draft.name] = self._stamp(draft.name)
        return info_of(self.root, draft.name, manifest, commit.manifest_sha256)

    def _seal(
        self,
        draft: Draft,
        request: SaveRequest,
        files: Mapping[str, FileEntry],
        state: Mapping[str, StateEntry],
    ) -> tuple[Manifest, bytes, Commit]:
        """Manifest and seal, accepted by the reader; what it would refuse is never acknowledged."""
        manifest = self._manifest(request, files, state)
        try:
            data, commit = sealed(manifest)
            if parse_name(draft.name) is None:
                raise ValueError(f"{draft.name!r} is no name of a checkpoint")
        except ValueError as error:
            raise SaveError(
                f"the checkpoint of step {request.step} was not saved to `{self.root}`, because it "
                f"could not be read again: {error}; earlier checkpoints are untouched"
            ) from error
        return manifest, data, commit

    def write_text(self, draft: Draft, file: str, text: bytes) -> FileEntry:
        """One small fsynced file of a draft."""
        handle = self.fs.create(f"{draft.temp}/{file}", len(text))
        try:
            return write_bytes_file(handle, text)
        finally:
            handle.close()

    def _manifest(
        self,
        request: SaveRequest,
        files: Mapping[str, FileEntry],
        state: Mapping[str, StateEntry],
    ) -> Manifest:
        found = self.scan()
        sealed = [info for info in found if info.problem is None]
        newest = max(sealed, key=lambda info: info.sequence, default=None)
        # One that cannot be read at the moment may hold a higher number.
        unknown = len(found) - len(sealed)
        return Manifest(
            step=request.step,
            sequence=(newest.sequence if newest else 0) + unknown + 1,
            run_id=self.run_id,
            created=self._now().isoformat(timespec="milliseconds"),
            parent=newest.manifest_sha256 if newest else None,
            healthy=request.healthy,
            finite=request.finite(),
            metrics=request.metrics,
            provenance=request.provenance,
            files=files,
            state=state,
        )

    def _write_all(
        self, temp: str, request: SaveRequest
    ) -> tuple[dict[str, FileEntry], dict[str, StateEntry]]:
        before = Before() if self.share_bytes is None else look_back(self, self.share_bytes)
        parts = {
            part.name: plan_files(
                part.name, part.tensors, request.shard_bytes, before.still.get(part.name, ())
            )
            for part in request.parts
        }
        texts = {f"{part.name}.json": part.json for part in request.parts}
        plans = {file: plan for planned in parts.values() for file, plan in planned.items()}
        if len(plans) != sum(len(planned) for planned in parts.values()):
            raise ValueError("two names of `state` would use the same file; rename one")
        files = self._share(before, plans, temp, request.alive)
        sizes = {file: plan.size for file, plan in plans.items() if file not in files}
        sizes |= {file: len(text) for file, text in texts.items()}
        self._preflight(sum(sizes.values()))
        handles: dict[str, WriteFile] = {}
        try:
            for file, size in sizes.items():
                handles[file] = self.fs.create(f"{temp}/{file}", size)
            files |= self._write_files(handles, plans, texts, request.alive)
        finally:
            for handle in handles.values():
                handle.close()
        state = {
            part.name: StateEntry(f"{part.name}.json", tuple(parts[part.name]))
            for part in request.parts
        }
        return files, state

    def _share(
        self,
        before: Before,
        plans: Mapping[str, TensorFilePlan],
        temp: str,
        alive: Callable[[], None],
    ) -> dict[str, FileEntry]:
        """Entries of the files that need not be written, because an older one could be shared."""

        def shared(file: str) -> FileEntry | None:
            return share(self, before, plans[file], f"{temp}/{file}", alive)

        found = zip(plans, each(shared, list(plans), self.threads), strict=True)
        return {file: entry for file, entry in found if entry is not None}

    def _preflight(self, need: int) -> None:
        free = self.fs.free_bytes(self.root)
        if free < need + SPARE_BYTES:
            raise OSError(
                errno.ENOSPC,
                f"it needs {need / 1e6:.1f} MB and the file system has {free / 1e6:.1f} MB free, "
                f"of which {SPARE_BYTES / 1e6:.1f} MB must stay free",
            )

    def _write_files(
        self,
        handles: Mapping[str, WriteFile],
        plans: Mapping[str, TensorFilePlan],
        texts: Mapping[str, bytes],
        alive: Callable[[], None],
    ) -> dict[str, FileEntry]:
        def write(file: str) -> FileEntry:
            if file in plans:
                return write_tensor_file(handles[file], plans[file], alive)
            return write_bytes_file(handles[file], texts[file])

        return dict(zip(handles, each(write, list(handles), self.threads), strict=True))

    def _free_name(self, step: int) -> str:
        taken = [
            parsed[1]
            for entry in self.fs.listdir(self.root)
            if (parsed := parse_name(entry.name)) and parsed[0] == step
        ]
        base = f"step-{step:08d}"
        return f"{base}.{max(taken) + 1}" if taken else base

    def _discard(self, path: str) -> None:
        """Best effort: the error that led here is the one to report."""
        try:
            if self.fs.entry(path) is None:
                return
            if not os.path.basename(path).startswith("."):  # noqa: PTH119
                trash = f"{self.root}/{TRASH_PREFIX}{self._nonce()}"
                self.fs.rename_noreplace(path, trash)
                # Emptying it before the new name is durable could leave a torn directory under
                # the old one; when this fails the next start removes it.
                self.fs.fsync_dir(self.root)
                path = trash
            remove_tree(self.fs, path)
        except OSError:
            return

    # -- retire --------------------------------------------------------------------------------

    def _stamp(self, name: str) -> tuple[Entry, ...]:
        try:
            return tuple(self.fs.listdir(f"{self.root}/{name}"))
        except OSError:
            return ()

    def _verifies(self, name: str) -> bool:
        if name in self._verified and self._verified[name] == self._stamp(name):
            return True
        stamp = self._stamp(name)
        try:
            self.verify(name)
        except (DamagedError, UnreadableError):
            return False
        self._verified[name] = stamp
        return True

    def retire(self, keep: Keep) -> list[str]:
        """Delete what the rule does not keep; returns the names. Call only after a save."""
        doomed = self._doomed(keep)
        self._lock.check()
        for name in doomed:
            self._verified.pop(name, None)
            trash = f"{self.root}/{TRASH_PREFIX}{name}-{self._nonce()}"
            self.fs.rename_noreplace(f"{self.root}/{name}", trash)
            self.fs.fsync_dir(self.root)
            remove_tree(self.fs, trash)
        return doomed

    def _doomed(self, keep: Keep) -> list[str]:
        """Victims of the rule, provided that two of the survivors verify byte for byte."""
        found = [info for info in self.scan() if info.problem is None]
        while doomed := victims(found, keep):
            survivors = [i for i in found if i.healthy and i.name not in doomed]
            survivors.sort(key=lambda info: -info.sequence)
            if len(survivors) < MIN_KEPT:
                return []
            bad = next((i for i in survivors[:MIN_KEPT] if not self._verifies(i.name)), None)
            if bad is None:
                return doomed
            found.remove(bad)
        return []

    def quarantine(self, name: str, reason: str) -> str:
        """Move a damaged checkpoint out of the way, keeping its bytes; returns the new path."""
        self.acquire()
        self._lock.check()
        self._verified.pop(name, None)
        folder = f"{self.root}/{QUARANTINE_NAME}"
        if self.fs.entry(folder) is None:
            self.fs.mkdir(folder)
        target = f"{folder}/{name}-{self._nonce()}"
        self.fs.rename_noreplace(f"{self.root}/{name}", target)
        self.fs.fsync_dir(folder)
        self.fs.fsync_dir(self.root)
        note = strict_json.dumps({"checkpoint": name, "reason": reason})
        handle = self.fs.create(f"{target}.reason.json", len(note))
        try:
            write_bytes_file(handle, note)
        finally:
            handle.close()
        return target
