"""The commit protocol: how a checkpoint becomes durable, is found again, and goes away.

    lock and fence → unique temporary directory → reserve space → write and hash, fsync each file
    → MANIFEST.json, fsync → COMMIT, fsync → fsync directory → rename without replacing
    → fsync parent → acknowledged → only now retention.

Nothing here imports torch: every byte goes through an `Fs`, so that tests can crash it anywhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from matilda_ckpt import strict_json
from matilda_ckpt.errors import CheckpointError, DamagedError, LockedError, SaveError
from matilda_ckpt.fs import Entry, Fs, Lock, WriteFile, read_small, remove_tree
from matilda_ckpt.manifest import (
    COMMIT_NAME,
    MANIFEST_NAME,
    MAX_COMMIT_BYTES,
    MAX_MANIFEST_BYTES,
    Commit,
    FileEntry,
    Manifest,
    StateEntry,
    TensorEntry,
    parse_commit,
    parse_manifest,
)
from matilda_ckpt.retention import MIN_KEPT, Keep, victims
from matilda_ckpt.strict_json import JSON
from matilda_ckpt.tensor_file import (
    TensorFilePlan,
    TensorSource,
    plan_tensor_file,
    read_tensor_file,
    write_bytes_file,
    write_tensor_file,
)

_STEP_NAME = re.compile(r"step-(\d{8,18})(?:\.(\d{1,9}))?")
LOCK_NAME = "LOCK"
QUARANTINE_NAME = "quarantine"
TEMP_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
SPARE_BYTES = 1 << 20
"""Room for manifest, directory blocks and rounding that the preflight asks for on top."""


@dataclass(frozen=True)
class Part:
    """One name of the saved state: its JSON, and its tensors grouped by file."""

    name: str
    json: bytes
    tensor_files: Mapping[str, Sequence[TensorSource]]


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as `list()` sees it: seal, manifest and file sizes checked, bytes not."""

    name: str
    path: str
    step: int
    sequence: int = 0
    created: str = ""
    bytes: int = 0
    healthy: bool = False
    """Saved as healthy, and every floating-point tensor finite."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None
    """Why it cannot be used, or None when it is intact as far as names and sizes show."""
    manifest_sha256: str = ""


@dataclass(frozen=True)
class SaveRequest:
    step: int
    parts: Sequence[Part]
    healthy: bool
    finite: Callable[[], bool]
    """Asked after the data is written, so that it can be computed on the way."""
    metrics: Mapping[str, float]
    provenance: Mapping[str, JSON]


def parse_name(name: str) -> tuple[int, int] | None:
    """(step, repetition) of a checkpoint directory name, or None."""
    match = _STEP_NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


class Store:
    """One checkpoint directory. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        fs: Fs,
        root: str,
        *,
        run_id: str,
        threads: int = 1,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        nonce: Callable[[], str] = lambda: secrets.token_hex(4),
    ) -> None:
        self.fs = fs
        self.root = root
        self.run_id = run_id
        self.threads = threads
        self._now = now
        self._nonce = nonce
        self._lock: Lock | None = None
        self._token = b""
        self._verified: dict[str, tuple[Entry, ...]] = {}

    # -- writer lock ---------------------------------------------------------------------------

    def acquire(self) -> None:
        """Become the only writer and clear what dead writers left; LockedError otherwise."""
        if self._lock is not None:
            return
        self._make_root()
        path = f"{self.root}/{LOCK_NAME}"
        lock = self.fs.lock(path)
        if lock is None:
            raise LockedError(
                f"another process is writing checkpoints to `{self.root}`; "
                "stop it, or give this run a directory of its own"
            )
        owner: dict[str, JSON] = {
            "pid": os.getpid(),
            "run_id": self.run_id,
            "token": secrets.token_hex(8),
        }
        self._token = strict_json.dumps(owner)
        try:
            lock.write(self._token)
            self.fs.fsync_dir(self.root)
            self._clear_leftovers()
        except BaseException:
            lock.release()
            raise
        self._lock = lock

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _check_fence(self) -> None:
        if self._lock is None or self._lock.read() != self._token:
            raise LockedError(
                f"another process has taken over `{self.root}`; this one stops writing to it"
            )

    def _make_root(self) -> None:
        missing = []
        path = self.root
        while self.fs.entry(path) is None:
            missing.append(path)
            parent = os.path.dirname(path)  # noqa: PTH120
            if parent == path:
                break
            path = parent
        for path in reversed(missing):
            try:
                self.fs.mkdir(path)
            except FileExistsError:
                continue
            self.fs.fsync_dir(os.path.dirname(path) or ".")  # noqa: PTH120

    def _clear_leftovers(self) -> None:
        for entry in self.fs.listdir(self.root):
            if entry.name.startswith((TEMP_PREFIX, TRASH_PREFIX)) and entry.kind == "dir":
                remove_tree(self.fs, f"{self.root}/{entry.name}")

    # -- save ----------------------------------------------------------------------------------

    def save(self, request: SaveRequest) -> CheckpointInfo:
        """Returns only when the checkpoint is durable; SaveError leaves the others untouched."""
        try:
            self.acquire()
            found = self.scan()
            name = self._free_name(request.step)
            temp = f"{self.root}/{TEMP_PREFIX}{name}-{self._nonce()}"
            try:
                manifest = self._write_all(temp, request, found)
                self._check_fence()
                self.fs.rename_noreplace(temp, f"{self.root}/{name}")
            except BaseException:
                self._discard(temp)
                raise
            try:
                self.fs.fsync_dir(self.root)
            except BaseException:
                # Visible but not durable: it must not be counted by anyone.
                self._discard(f"{self.root}/{name}")
                raise
        except OSError as error:
            raise SaveError(
                f"the checkpoint of step {request.step} was not saved to `{self.root}`: "
                f"{_reason(error)}; earlier checkpoints are untouched"
            ) from error
        self._verified[name] = self._stamp(name)
        return _info(self.root, name, manifest, Commit.of(manifest.to_bytes()).manifest_sha256)

    def _write_all(
        self, temp: str, request: SaveRequest, found: Sequence[CheckpointInfo]
    ) -> Manifest:
        plans = {
            file: plan_tensor_file(tensors)
            for part in request.parts
            for file, tensors in part.tensor_files.items()
        }
        texts = {f"{part.name}.json": part.json for part in request.parts}
        sizes = {file: plan.size for file, plan in plans.items()}
        sizes |= {file: len(text) for file, text in texts.items()}
        self.fs.mkdir(temp)
        self._preflight(sum(sizes.values()))
        handles: dict[str, WriteFile] = {}
        try:
            for file, size in sizes.items():
                handles[file] = self.fs.create(f"{temp}/{file}", size)
            files = self._write_files(handles, plans, texts)
        finally:
            for handle in handles.values():
                handle.close()
        sealed = [info for info in found if info.problem is None]
        newest = max(sealed, key=lambda info: info.sequence, default=None)
        manifest = Manifest(
            step=request.step,
            sequence=newest.sequence + 1 if newest else 1,
            run_id=self.run_id,
            created=self._now().isoformat(timespec="milliseconds"),
            parent=newest.manifest_sha256 if newest else None,
            healthy=request.healthy,
            finite=request.finite(),
            metrics=request.metrics,
            provenance=request.provenance,
            files=files,
            state={
                part.name: StateEntry(f"{part.name}.json", tuple(part.tensor_files))
                for part in request.parts
            },
        )
        data = manifest.to_bytes()
        for file, text in ((MANIFEST_NAME, data), (COMMIT_NAME, Commit.of(data).to_bytes())):
            handle = self.fs.create(f"{temp}/{file}", len(text))
            try:
                write_bytes_file(handle, text)
            finally:
                handle.close()
        self.fs.fsync_dir(temp)
        return manifest

    def _preflight(self, need: int) -> None:
        free = self.fs.free_bytes(self.root)
        if free < need + SPARE_BYTES:
            raise OSError(
                errno.ENOSPC,
                f"it needs {need / 1e6:.1f} MB and the file system has {free / 1e6:.1f} MB free",
            )

    def _write_files(
        self,
        handles: Mapping[str, WriteFile],
        plans: Mapping[str, TensorFilePlan],
        texts: Mapping[str, bytes],
    ) -> dict[str, FileEntry]:
        failed = threading.Event()

        def write(file: str) -> FileEntry | None:
            if failed.is_set():
                return None
            try:
                if file in plans:
                    return write_tensor_file(handles[file], plans[file])
                return write_bytes_file(handles[file], texts[file])
            except BaseException:
                failed.set()
                raise

        entries = each(write, list(handles), self.threads)
        return {file: entry for file, entry in zip(handles, entries, strict=True) if entry}

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
                path = trash
            remove_tree(self.fs, path)
        except OSError:
            return

    # -- find and verify -----------------------------------------------------------------------

    def scan(self) -> list[CheckpointInfo]:
        """Every checkpoint, newest first (damaged ones by their step, before their equals)."""
        if self.fs.entry(self.root) is None:
            return []
        found = []
        for entry in self.fs.listdir(self.root):
            parsed = parse_name(entry.name)
            if parsed is None:
                continue
            try:
                manifest, sha256 = self.open(entry.name)
                found.append(_info(self.root, entry.name, manifest, sha256))
            except CheckpointError as error:
                found.append(
                    CheckpointInfo(
                        entry.name, f"{self.root}/{entry.name}", parsed[0], problem=str(error)
                    )
                )
        found.sort(key=lambda info: info.name)
        intact = sorted((info for info in found if info.problem is None), key=lambda i: -i.sequence)
        damaged = sorted((info for info in found if info.problem), key=lambda i: -i.step)
        merged: list[CheckpointInfo] = []
        for info in intact:
            while damaged and damaged[0].step >= info.step:
                merged.append(damaged.pop(0))
            merged.append(info)
        return merged + damaged

    def open(self, name: str) -> tuple[Manifest, str]:
        """Seal, manifest, set of files and sizes; DamagedError naming what is wrong."""
        path = f"{self.root}/{name}"

        def damaged(file: str, text: str) -> DamagedError:
            return DamagedError(f"checkpoint `{path}`: `{file}` {text}")

        try:
            entries = {entry.name: entry for entry in self.fs.listdir(path)}
        except OSError as error:
            raise DamagedError(f"checkpoint `{path}` cannot be read: {_reason(error)}") from error
        for required in (COMMIT_NAME, MANIFEST_NAME):
            if required not in entries:
                raise damaged(required, "is missing")
        file = COMMIT_NAME
        try:
            commit = parse_commit(read_small(self.fs, f"{path}/{file}", MAX_COMMIT_BYTES))
            file = MANIFEST_NAME
            data = read_small(self.fs, f"{path}/{file}", MAX_MANIFEST_BYTES)
            sha256 = hashlib.sha256(data).hexdigest()
            if len(data) != commit.manifest_size or sha256 != commit.manifest_sha256:
                raise damaged(file, f"is not the one that `{COMMIT_NAME}` seals")
            manifest = parse_manifest(data)
        except OSError as error:
            raise damaged(file, f"cannot be read: {_reason(error)}") from error
        except ValueError as error:
            raise damaged(file, f"is unusable: {error}") from error
        parsed = parse_name(name)
        if parsed is not None and parsed[0] != manifest.step:
            raise damaged(MANIFEST_NAME, f"is of step {manifest.step}, not of this directory")
        self._check_files(entries, manifest, damaged)
        return manifest, sha256

    def _check_files(
        self,
        entries: Mapping[str, Entry],
        manifest: Manifest,
        damaged: Callable[[str, str], DamagedError],
    ) -> None:
        for file, entry in manifest.files.items():
            found = entries.get(file)
            if found is None:
                raise damaged(file, "is missing")
            if found.kind != "file":
                raise damaged(file, "is not a regular file")
            if found.size != entry.size:
                raise damaged(file, f"is {found.size} bytes instead of {entry.size}")
        extra = sorted(set(entries) - set(manifest.files) - {COMMIT_NAME, MANIFEST_NAME})
        if extra:
            raise damaged(extra[0][:80], "is not part of this checkpoint")

    def verify(self, name: str) -> Manifest:
        """Every byte against its hash; DamagedError naming file and tensor."""
        manifest, _ = self.open(name)
        stamp = self._stamp(name)

        def check(file: str) -> None:
            self.read_tensors(name, manifest, file, lambda _name, _tensor: None)

        each(check, [f for f, e in manifest.files.items() if e.header_size], self.threads)
        for entry in manifest.state.values():
            self.read_json(name, manifest, entry.json)
        self.note_verified(name, stamp)
        return manifest

    def read_json(self, name: str, manifest: Manifest, file: str) -> bytes:
        """Verified content of a JSON file."""
        entry = manifest.files[file]
        path = f"{self.root}/{name}"
        try:
            data = read_small(self.fs, f"{path}/{file}", entry.size)
        except (OSError, ValueError) as error:
            raise DamagedError(f"checkpoint `{path}`: `{file}` cannot be read: {error}") from error
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise DamagedError(f"checkpoint `{path}`: `{file}` is damaged (SHA-256 differs)")
        return data

    def read_tensors(
        self,
        name: str,
        manifest: Manifest,
        file: str,
        allocate: Callable[[str, TensorEntry], memoryview | None],
    ) -> None:
        """Read and verify one tensor file into the buffers that `allocate` returns."""
        path = f"{self.root}/{name}"
        try:
            read_tensor_file(
                self.fs,
                f"{path}/{file}",
                manifest.files[file],
                allocate,
                lambda text: DamagedError(f"checkpoint `{path}`: `{file}` {text}"),
            )
        except OSError as error:
            raise DamagedError(
                f"checkpoint `{path}`: `{file}` cannot be read: {_reason(error)}"
            ) from error

    # -- retire --------------------------------------------------------------------------------

    def note_verified(self, name: str, stamp: tuple[Entry, ...] | None = None) -> None:
        """Remember that every byte of `name` was checked (forgotten when a file changes)."""
        self._verified[name] = self._stamp(name) if stamp is None else stamp

    def _stamp(self, name: str) -> tuple[Entry, ...]:
        try:
            return tuple(self.fs.listdir(f"{self.root}/{name}"))
        except OSError:
            return ()

    def _verifies(self, name: str) -> bool:
        if name in self._verified and self._verified[name] == self._stamp(name):
            return True
        try:
            self.verify(name)
        except DamagedError:
            return False
        return True

    def retire(self, keep: Keep) -> list[str]:
        """Delete what the rule does not keep; returns the names. Call only after a save."""
        doomed = self._doomed(keep)
        self._check_fence()
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

    def quarantined(self) -> list[str]:
        """Names of the directories that were set aside as damaged."""
        folder = f"{self.root}/{QUARANTINE_NAME}"
        if self.fs.entry(folder) is None:
            return []
        return [entry.name for entry in self.fs.listdir(folder) if entry.kind == "dir"]

    def quarantine(self, name: str, reason: str) -> str:
        """Move a damaged checkpoint out of the way, keeping its bytes; returns the new path."""
        self.acquire()
        self._check_fence()
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


T = TypeVar("T")


def each(call: Callable[[str], T], items: Sequence[str], threads: int) -> list[T]:
    """`call` on every item, in this thread when one is enough; the first error is raised."""
    if threads <= 1 or len(items) <= 1:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items)), "matilda-ckpt") as pool:
        return [future.result() for future in [pool.submit(call, item) for item in items]]


def _info(root: str, name: str, manifest: Manifest, sha256: str) -> CheckpointInfo:
    return CheckpointInfo(
        name=name,
        path=f"{root}/{name}",
        step=manifest.step,
        sequence=manifest.sequence,
        created=manifest.created,
        bytes=manifest.total_bytes,
        healthy=manifest.healthy and manifest.finite,
        metrics=manifest.metrics,
        manifest_sha256=sha256,
    )


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return f"{text} (`{error.filename}`)" if error.filename else text
