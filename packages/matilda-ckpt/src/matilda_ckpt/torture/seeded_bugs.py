"""Fourteen broken protocols. A crash suite that passes one of them proves nothing.

Each is a mistake found in real checkpointers, applied to the real code in the model file system.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matilda_ckpt.catalog import CheckpointInfo
from matilda_ckpt.checkpointer import Checkpointer
from matilda_ckpt.fs import remove_tree
from matilda_ckpt.manifest import COMMIT_NAME, MANIFEST_NAME, Commit
from matilda_ckpt.retention import Keep
from matilda_ckpt.store import SaveRequest, Store
from matilda_ckpt.tensor_file import write_bytes_file
from matilda_ckpt.torture.memfs import MemFs
from matilda_ckpt.torture.model import ROOT, Maker, plain, with_store

if TYPE_CHECKING:
    from matilda_ckpt.snapshot import Snapshot


@dataclass(frozen=True)
class SeededBug:
    """A broken writer and the scenario that must catch it."""

    scenario: str
    fs: Callable[[], MemFs] = MemFs
    make: Maker = plain


def _without(operation: str, hit: Callable[[str], bool]) -> Callable[[], MemFs]:
    def build() -> MemFs:
        fs = MemFs()
        fs.skips = lambda name, path: name == operation and hit(path)
        return fs

    return build


class _LateFsyncFs(MemFs):
    """Files are fsynced only after the rename has made them visible."""

    def __init__(self) -> None:
        super().__init__()
        self._late: list[tuple[str, str]] = []
        self.skips = self._postpone

    def _postpone(self, name: str, path: str) -> bool:
        if name == "fsync" and "/.tmp-" in path:
            self._late.append((name, path))
            return True
        return False

    def rename_noreplace(self, src: str, dst: str) -> None:
        super().rename_noreplace(src, dst)
        for node in getattr(self._find(dst), "names", {}).values():
            node.durable = bytes(getattr(node, "data", b""))


class _TrashNotSyncedFs(MemFs):
    """The rename into the trash is not made durable before the victim is emptied."""

    def __init__(self) -> None:
        super().__init__()
        self._last = ""
        self.skips = lambda name, path: name == "fsync_dir" and "/.trash-" in self._last

    def _did(self, name: str, path: str) -> None:
        self._last = path
        super()._did(name, path)


class _RetentionFirst(Store):
    """Room is made before the new checkpoint is durable."""

    def save(self, request: SaveRequest) -> CheckpointInfo:
        self.acquire()
        for info in self.scan():
            trash = f"{self.root}/.trash-{info.name}"
            self.fs.rename_noreplace(info.path, trash)
            self.fs.fsync_dir(self.root)
            remove_tree(self.fs, trash)
        return super().save(request)


class _Overwrite(Store):
    """The old directory of the same step is removed so that the name is free."""

    def save(self, request: SaveRequest) -> CheckpointInfo:
        self.acquire()
        old = f"{self.root}/step-{request.step:08d}"
        if self.fs.entry(old) is not None:
            remove_tree(self.fs, old)
        return super().save(request)


class _RemoveInPlace(Store):
    """Victims are emptied under their own name."""

    def retire(self, keep: Keep) -> list[str]:
        doomed = self._doomed(keep)
        for name in doomed:
            remove_tree(self.fs, f"{self.root}/{name}")
        return doomed


class _InPlace(Store):
    """Files are written straight into the final directory, as most peers do."""

    def save(self, request: SaveRequest) -> CheckpointInfo:
        self.acquire()
        final = f"{self.root}/{self._free_name(request.step)}"
        self.fs.mkdir(final)
        files, state = self._write_all(final, request)
        data = self._manifest(request, files, state).to_bytes()
        for name, text in ((MANIFEST_NAME, data), (COMMIT_NAME, Commit.of(data).to_bytes())):
            write_bytes_file(self.fs.create(f"{final}/{name}", len(text)), text)
        self.fs.fsync_dir(final)
        self.fs.fsync_dir(self.root)
        return next(info for info in self.scan() if info.path == final)


class _Careless(Checkpointer):
    """What training changed before it was copied is published all the same."""

    def _new_snapshot(self, step: int, defer: bool) -> Snapshot:
        snapshot = super()._new_snapshot(step, defer)
        snapshot.check = lambda: None  # type: ignore[method-assign]
        return snapshot


def _careless(fs: MemFs, keep: Keep) -> Checkpointer:
    return _Careless(ROOT, fs=fs, keep=keep, threads=1)


BUGS: dict[str, SeededBug] = {
    "tensor files not fsynced": SeededBug(
        "save", _without("fsync", lambda path: path.endswith(".safetensors"))
    ),
    "clones not fsynced": SeededBug(
        "unchanged, cloned", _without("fsync", lambda path: path.endswith("-00002.safetensors"))
    ),
    "manifest not fsynced": SeededBug(
        "save", _without("fsync", lambda path: path.endswith("MANIFEST.json"))
    ),
    "COMMIT not fsynced": SeededBug(
        "save", _without("fsync", lambda path: path.endswith("COMMIT"))
    ),
    "temporary directory not fsynced": SeededBug(
        "save", _without("fsync_dir", lambda path: "/.tmp-" in path)
    ),
    "parent directory not fsynced": SeededBug(
        "save", _without("fsync_dir", lambda path: path == ROOT)
    ),
    "new root's own name not fsynced": SeededBug(
        "save", _without("fsync_dir", lambda path: path == ROOT.rpartition("/")[0])
    ),
    "rename before fsync": SeededBug("save", _LateFsyncFs),
    "retention before acknowledgement": SeededBug("retention", make=with_store(_RetentionFirst)),
    "overwriting the same step": SeededBug("same step again", make=with_store(_Overwrite)),
    "victim removed under its own name": SeededBug("retention", make=with_store(_RemoveInPlace)),
    "trash rename not fsynced": SeededBug("retention", _TrashNotSyncedFs),
    "written in place": SeededBug("save", make=with_store(_InPlace)),
    "changed before the copy": SeededBug("deferred copy, changed too early", make=_careless),
}
