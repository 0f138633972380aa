"""Kernels that torch.compile's artifacts leave out, in one archive beside the run.

Triton kernels written by hand, and those of FlashAttention-4 and quack (CuTe DSL), are compiled by
compilers of their own into caches of their own on the machine's disk. A new machine would make them
again. Their caches name every file by a hash of what it was made of, so one that is out of date is
never used. Loading trusts the archive as loading code does.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from matilda_train.whole_file import write_whole

__all__ = ["KernelFiles"]

# archive folder -> module that knows where its compiled objects lie
OBJECT_CACHES = {"flash_attn": "flash_attn.cute.cache_utils", "quack": "quack.cache"}
MOST_BYTES = 64 * 2**20
"""Size of an archive before compression; a machine's cache may hold what other programs left."""

UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What `zipfile` raises for one damaged byte or another."""

INDUCTOR_PREFIX = "triton_"
"""Names of torch.compile's own Triton kernels, which its artifacts hold."""


class KernelFiles:
    """One archive at `path`. `watch`, then `load`, before the first kernel is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._triton: dict[str, dict[str, Path]] = {}  # cache key -> file name -> file
        self._kept: set[str] = set()
        self._compiled: set[str] = set()  # cache keys of Triton kernels
        self._began = time.time()
        self._restore: Callable[[], None] = lambda: None

    def watch(self) -> None:
        """Until `close`, note each Triton kernel that this process compiles or finds in a cache."""
        try:
            from triton import knobs
        except ImportError:
            return
        before = knobs.compilation.listener

        def note(**compiled: Any) -> None:
            self._note(compiled.get("metadata_group") or {}, compiled.get("cache_hit") is False)
            if before is not None:
                before(**compiled)

        def restore() -> None:
            if knobs.compilation.listener is note:
                knobs.compilation.listener = before

        knobs.compilation.listener, self._restore = note, restore

    def close(self) -> None:
        """Take note of nothing more."""
        self._restore()

    def load(self) -> bool:
        """Put what the archive holds into the machine's caches where it is missing.

        Whether there was an archive, and all of it whole. Errors of a disk cost time only.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                if archive.testzip() is not None:
                    return False
                names = archive.namelist()
                for cache in {PurePosixPath(name).parts[0] for name in names}:
                    for folder in _folders(cache):
                        _extract(archive, cache, folder)
        except UNREADABLE:
            return False
        self._kept = set(names)
        return True

    def save(self) -> bool:
        """Write the archive if this process used kernels that it does not hold.

        What it held stays in it. Raises `OSError` when the disk takes no more.
        """
        found = self._used()
        if found.keys() <= self._kept:
            return False
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            written = set()
            for name, content in itertools.chain(self._held(), _contents(found)):
                if name not in written:
                    written.add(name)
                    archive.writestr(name, content)
        write_whole(self.path, whole.getvalue())
        self._kept = written
        return True

    def compiled(self) -> int:
        """Kernels that this process had to make: in no cache of the machine, nor in the archive."""
        objects = [
            name
            for name, file in _objects()
            if _modified(file) >= self._began and name not in self._kept
        ]
        return len(self._compiled) + len(objects)

    def _note(self, group: dict[str, str], compiled: bool) -> None:
        files = {name: Path(path) for name, path in group.items()}
        for name, path in files.items():
            if name.endswith(".json") and not name.startswith(INDUCTOR_PREFIX):
                self._triton[path.parent.name] = files
                if compiled:
                    self._compiled.add(path.parent.name)

    def _used(self) -> dict[str, Path]:
        """Every file to keep by its name in the archive."""
        files: list[tuple[str, Path]] = []
        for key, group in self._triton.items():
            for name, path in group.items():
                # the stages between source and machine code are for people
                if not name.endswith((".ttir", ".ttgir", ".llir", ".ptx", ".source")):
                    files.append((f"triton/{key}/{name}", path))
        files += _objects()
        kept, left = {}, MOST_BYTES
        for name, path in files:
            with contextlib.suppress(FileNotFoundError):  # another process cleans up
                size = path.stat().st_size
                if size <= left:
                    left -= size
                    kept[name] = path
        return kept

    def _held(self) -> Iterator[tuple[str, bytes]]:
        if not self._kept:
            return
        with contextlib.suppress(*UNREADABLE), zipfile.ZipFile(self.path) as archive:
            for name in archive.namelist():
                yield name, archive.read(name)


def _objects() -> list[tuple[str, Path]]:
    """What CuTe DSL's caches hold, by its name in the archive; of each cache the newest first."""
    found = []
    for cache, module in OBJECT_CACHES.items():
        if module in sys.modules:
            folder = Path(sys.modules[module].get_cache_path())
            objects = sorted(folder.rglob("*.o"), key=_modified, reverse=True)
            found += [(f"{cache}/{o.relative_to(folder).as_posix()}", o) for o in objects]
    return found


def _contents(files: dict[str, Path]) -> Iterator[tuple[str, bytes]]:
    for name, path in files.items():
        with contextlib.suppress(FileNotFoundError):
            yield name, path.read_bytes()


def _folders(cache: str) -> list[Path]:
    """Where a cache of this machine lies; none where its compiler is not installed."""
    if cache == "triton":
        return _triton_folders()
    if cache not in OBJECT_CACHES:
        return []
    if cache == "flash_attn":
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # read by the import
    with contextlib.suppress(Exception):  # whatever ails another's package costs time only
        return [Path(importlib.import_module(OBJECT_CACHES[cache]).get_cache_path())]
    return []


def _triton_folders() -> list[Path]:
    try:
        import torch
        from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
        from triton import knobs
    except ImportError:
        return []
    folders = [Path(knobs.cache.dir)]
    if "TRITON_CACHE_DIR" not in os.environ and torch.cuda.is_available():
        # inductor sends all of Triton there from its first kernel on
        folders.append(Path(triton_cache_dir(torch.cuda.current_device())))
    return folders


def _extract(archive: zipfile.ZipFile, cache: str, folder: Path) -> None:
    """Files of `cache` that `folder` lacks; a Triton kernel's list of files comes after them."""
    groups: dict[Path, list[Path]] = {}
    for name in archive.namelist():
        first, *rest = PurePosixPath(name).parts
        if first != cache:
            continue
        if not rest or ".." in rest:
            raise ValueError(f"{name!r} does not lie within a cache")
        file = folder.joinpath(*rest)
        if not file.exists():
            write_whole(file, archive.read(name))
        groups.setdefault(file.parent, []).append(file)
    if cache != "triton":
        return
    for parent, files in groups.items():
        for file in files:
            listing = parent / f"__grp__{file.name}"
            if file.suffix == ".json" and not listing.exists():
                paths = {child.name: str(child) for child in files}
                write_whole(listing, json.dumps({"child_paths": paths}).encode())


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
