"""Stamps: a verified file is not hashed again until its inode says that it was touched.

`.verified.json` beside the manifest holds, for each verified shard, its device, inode, size, mtime
and ctime with the SHA-256 they stood for. A stamp that is damaged, of another data set or of
another file is ignored, and the file is hashed again: stamps only ever save time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from matilda_data.durable import TEMP_PREFIX
from matilda_data.manifest import canonical_json

__all__ = ["STAMP_NAME", "FileState", "Stamps", "file_state"]

STAMP_NAME = ".verified.json"
FORMAT = "matilda-stamp/1"
# A file changed within one tick of the clock keeps its ctime; younger files get no stamp.
RACY_NS = 1_000_000_000

FileState = tuple[int, int, int, int, int]


def file_state(path: Path) -> FileState:
    """(device, inode, size, mtime_ns, ctime_ns): changes whenever anything touches the file."""
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class Stamps:
    """The stamps of one data set directory."""

    def __init__(self, directory: Path, data_id: str) -> None:
        self._path = directory / STAMP_NAME
        self._directory = directory
        self._data_id = data_id
        self._files = self._read()

    def _read(self) -> dict[str, list[object]]:
        try:
            value = json.loads(self._path.read_bytes())
            files = value["files"]
            fits = value["format"] == FORMAT and value["data_id"] == self._data_id
            if fits and value["check"] == _check(self._data_id, files):
                return dict(files)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return {}

    def holds(self, name: str, sha256: str) -> bool:
        """Whether `name` was verified to have `sha256` and has not been touched since."""
        try:
            return self._files.get(name) == [*file_state(self._directory / name), sha256]
        except OSError:
            return False

    def add(self, name: str, sha256: str, state: FileState) -> None:
        """Record that `name`, in `state` since before it was hashed, has `sha256`.

        Nothing is recorded when the file is too young or was touched meanwhile, or when the
        directory is read-only.
        """
        with contextlib.suppress(OSError):
            age = time.time_ns() - max(state[3], state[4])
            if age < RACY_NS or file_state(self._directory / name) != state:
                return
            self._files = {**self._read(), name: [*state, sha256]}
            value = {
                "format": FORMAT,
                "data_id": self._data_id,
                "files": self._files,
                "check": _check(self._data_id, self._files),
            }
            temporary = self._path.with_name(f"{TEMP_PREFIX}{STAMP_NAME}-{os.getpid()}")
            temporary.write_bytes(canonical_json(value))
            temporary.replace(self._path)


def _check(data_id: str, files: object) -> str:
    return hashlib.sha256(canonical_json([FORMAT, data_id, files])).hexdigest()
