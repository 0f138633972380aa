"""Reading half of a checkpoint directory: find, check, verify. Trusts no byte it reads.

Nothing here imports torch, takes a lock or changes anything on disk.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from matilda_ckpt.errors import (
    CheckpointError,
    DamagedError,
    OtherFormatError,
    UnreadableError,
)
from matilda_ckpt.fs import Entry, Fs, read_small
from matilda_ckpt.manifest import (
    COMMIT_NAME,
    FORMAT,
    MANIFEST_NAME,
    MAX_COMMIT_BYTES,
    MAX_MANIFEST_BYTES,
    Manifest,
    TensorEntry,
    parse_commit,
    parse_manifest,
)
from matilda_ckpt.parallel import each
from matilda_ckpt.tensor_file import read_one_tensor, read_tensor_file

_STEP_NAME = re.compile(r"step-(\d{8,18})(?:\.(\d{1,9}))?")
_FORMAT = re.compile(rb'"format": ?"(matilda-ckpt/\d{1,6})"')
QUARANTINE_NAME = "quarantine"


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
    other_format: bool = False
    """It is not damaged, but another version of this package wrote it."""
    unreadable: bool = False
    """It may be intact, but cannot be read at present; see `UnreadableError`."""


def parse_name(name: str) -> tuple[int, int] | None:
    """(step, repetition) of a checkpoint directory name, or None."""
    match = _STEP_NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def one_of_them(root: str) -> str:
    """The mistake of a caller who gives one checkpoint where a directory of them is meant."""
    return (
        f"`{root}` is one checkpoint, and nothing may be added to it; "
        "give the directory that holds it"
    )


class Catalog:
    """The checkpoints of one directory, read only."""

    def __init__(self, fs: Fs, root: str, *, threads: int = 1) -> None:
        self.fs = fs
        self.root = root
        self.threads = threads
        self._opened: dict[str, tuple[tuple[Entry, ...], Manifest, str]] = {}

    def scan(self) -> list[CheckpointInfo]:
        """Every checkpoint, newest first (damaged ones by their step, before their equals).

        ValueError when the directory is itself a checkpoint.
        """
        if self.fs.entry(self.root) is None:
            return []
        found = []
        listed = self._listed()
        if COMMIT_NAME in listed and MANIFEST_NAME in listed:
            raise ValueError(one_of_them(self.root))
        for name, stamp in listed.items():
            parsed = parse_name(name)
            if parsed is None:
                continue
            try:
                manifest, sha256 = self.open(name, stamp=stamp)
                found.append(info_of(self.root, name, manifest, sha256))
            except CheckpointError as error:
                if isinstance(error, DamagedError) and not self.holds(name):
                    continue  # retention took it away meanwhile
                found.append(
                    CheckpointInfo(
                        name,
                        f"{self.root}/{name}",
                        parsed[0],
                        problem=str(error),
                        other_format=isinstance(error, OtherFormatError),
                        unreadable=isinstance(error, UnreadableError),
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

    def holds(self, name: str) -> bool:
        """Whether a checkpoint of this name is there now, damaged or not."""
        return any(entry.name == name for entry in self.fs.listdir(self.root))

    def retired(self, name: str) -> bool:
        """Whether it has gone for good since it was listed, and not into quarantine."""
        if self.holds(name):
            return False
        folder = f"{self.root}/{QUARANTINE_NAME}"
        # A directory here, the note of why in object storage.
        aside = re.compile(re.escape(name) + r"(-[0-9a-f]+)?(\.reason\.json)?")
        put = self.fs.listdir(folder) if self.fs.entry(folder) is not None else []
        return not any(aside.fullmatch(entry.name) for entry in put)

    def _listed(self) -> dict[str, tuple[Entry, ...] | None]:
        """What the directory holds, and what is in each where one listing says that too."""
        return {entry.name: None for entry in self.fs.listdir(self.root)}

    def open(
        self, name: str, *, fresh: bool = False, stamp: tuple[Entry, ...] | None = None
    ) -> tuple[Manifest, str]:
        """Seal, manifest, set of files and sizes; DamagedError naming what is wrong.

        An answer is kept for as long as no file changes its inode, size or times; `fresh` reads
        again in any case. `stamp` is a listing of it that was made just now.
        """
        path = f"{self.root}/{name}"

        def damaged(file: str, text: str) -> DamagedError:
            return DamagedError(f"checkpoint `{path}`: `{file}` {text}")

        try:
            stamp = tuple(self.fs.listdir(path)) if stamp is None else stamp
        except OSError as error:
            raise _not_read(f"checkpoint `{path}`", error) from error
        known = self._opened.get(name)
        if known is not None and known[0] == stamp and not fresh:
            return known[1], known[2]
        entries = {entry.name: entry for entry in stamp}
        for required in (COMMIT_NAME, MANIFEST_NAME):
            if required not in entries:
                if any(map(parse_name, entries)):
                    raise damaged(
                        required, "is missing: that is a directory of checkpoints; give one of them"
                    )
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
            raise _not_read(f"checkpoint `{path}`: `{file}`", error) from error
        except ValueError as error:
            other = self._other_format(path)
            if other is not None:
                raise OtherFormatError(
                    f"checkpoint `{path}` has format {other!r}, and this version reads {FORMAT!r}: "
                    "use the matilda-ckpt that wrote it"
                ) from None
            raise damaged(file, f"is unusable: {error}") from error
        parsed = parse_name(name)
        if parsed is not None and parsed[0] != manifest.step:
            raise damaged(MANIFEST_NAME, f"is of step {manifest.step}, not of this directory")
        self._check_files(entries, manifest, damaged)
        self._opened[name] = (stamp, manifest, sha256)
        return manifest, sha256

    def _other_format(self, path: str) -> str | None:
        """The format that seal and manifest agree on, if it is not this one and the seal holds."""
        try:
            commit = read_small(self.fs, f"{path}/{COMMIT_NAME}", MAX_COMMIT_BYTES)
            data = read_small(self.fs, f"{path}/{MANIFEST_NAME}", MAX_MANIFEST_BYTES)
        except (OSError, ValueError):
            return None
        # One flipped bit does not say the same in both files and keep the hash.
        found = {match[1] for match in map(_FORMAT.search, (commit, data)) if match}
        sealed = hashlib.sha256(data).hexdigest().encode() in commit
        if not sealed or len(found) != 1 or found == {FORMAT.encode()}:
            return None
        return found.pop().decode()

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
        # A desktop's or a network file system's own (`.DS_Store`, `.nfs…`); none of ours is hidden.
        strange = {name for name in entries if not name.startswith(".")}
        extra = sorted(strange - set(manifest.files) - {COMMIT_NAME, MANIFEST_NAME})
        if extra:
            raise damaged(extra[0][:80], "is not part of this checkpoint")

    def verify(self, name: str) -> Manifest:
        """Every byte against its hash; DamagedError naming file and tensor."""
        manifest, _ = self.open(name, fresh=True)

        def check(file: str) -> None:
            self.read_tensors(name, manifest, file, lambda _name, _tensor: None)

        each(check, [f for f, e in manifest.files.items() if e.header_size], self.threads)
        for entry in manifest.state.values():
            self.read_json(name, manifest, entry.json)
        return manifest

    def read_json(self, name: str, manifest: Manifest, file: str) -> bytes:
        """Verified content of a JSON file."""
        entry = manifest.files[file]
        path = f"{self.root}/{name}"
        try:
            data = read_small(self.fs, f"{path}/{file}", entry.size)
        except OSError as error:
            raise _not_read(f"checkpoint `{path}`: `{file}`", error) from error
        except ValueError as error:
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
            raise _not_read(f"checkpoint `{path}`: `{file}`", error) from error

    def read_one_tensor(
        self, name: str, manifest: Manifest, file: str, key: str, buffer: memoryview
    ) -> None:
        """Read and verify a single tensor without its neighbours."""
        path = f"{self.root}/{name}"
        entry = manifest.files[file]
        try:
            good = read_one_tensor(self.fs, f"{path}/{file}", entry, key, buffer)
        except OSError as error:
            raise _not_read(f"checkpoint `{path}`: `{file}`", error) from error
        if not good:
            raise DamagedError(
                f"checkpoint `{path}`: `{file}` has a damaged tensor {key!r} (SHA-256 differs)"
            )

    def quarantined(self) -> list[str]:
        """Names of the directories that were set aside as damaged."""
        folder = f"{self.root}/{QUARANTINE_NAME}"
        if self.fs.entry(folder) is None:
            return []
        return [entry.name for entry in self.fs.listdir(folder) if entry.kind == "dir"]


def info_of(root: str, name: str, manifest: Manifest, sha256: str) -> CheckpointInfo:
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


_NO_DAMAGE = {
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EBUSY),
    *(errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT),
}


def _not_read(what: str, error: OSError) -> CheckpointError:
    """The error to raise: damage, unless the system refused for a reason of its own."""
    text = f"{what} cannot be read: {reason_of(error)}"
    refused = isinstance(error, PermissionError | TimeoutError | ConnectionError)
    if refused or error.errno in _NO_DAMAGE:
        return UnreadableError(f"{text}; it stays where it is: mend that, then try again")
    return DamagedError(text)


def reason_of(error: OSError) -> str:
    text = error.strerror or str(error)
    return f"{text} (`{error.filename}`)" if error.filename else text
