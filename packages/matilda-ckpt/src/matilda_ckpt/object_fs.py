"""Object storage (S3, GCS, Azure, …) through fsspec, as the `Fs` that a catalog reads from.

An object appears whole when its upload ends and stays durable from then on: `fsync` is the end of
the upload, and there is nothing to sync for a directory. What is missing is an atomic rename;
`object_store.ObjectStore` therefore publishes by the conditional creation of COMMIT.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from matilda_ckpt.catalog import parse_name
from matilda_ckpt.fs import Entry, Lock, ReadFile, WriteFile
from matilda_ckpt.manifest import COMMIT_NAME

BLOCK_BYTES = 16 << 20
"""Uploaded and fetched at a time by each thread."""
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)")


def object_url(path: str | os.PathLike[str]) -> str | None:
    """`scheme://bucket/…` when `path` is one (also after a trip through `Path`), else None."""
    match = _URL.fullmatch(os.fspath(path))
    return f"{match[1]}://{match[2].rstrip('/')}" if match else None


@contextmanager
def _as_os_errors(path: str) -> Iterator[None]:
    """Clients raise errors of their own; the protocol knows OSError only."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, PermissionError, ValueError):
        raise
    except Exception as error:
        # Of the way to the object, not of the object, which the store itself keeps whole.
        text = f"{type(error).__name__}: {error}"
        raise TimeoutError(errno.ETIMEDOUT, text, path) from error


class ObjectFs:
    """`Fs` over object storage; paths are URLs.

    Args:
        url: any URL of the store.
        storage_options: what fsspec hands to the client, for instance `endpoint_url`.

    Raises ValueError when fsspec, or its package for this scheme, is not installed.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        try:
            import fsspec  # type: ignore[import-untyped,unused-ignore]

            self._fs, _ = fsspec.url_to_fs(url, use_listings_cache=False, **(storage_options or {}))
        except ImportError as error:
            raise ValueError(
                f"`{url}` needs a package that is not installed ({error}); "
                "for S3: `pip install 'matilda-ckpt[s3]'`"
            ) from error

    def put_new(self, path: str, data: bytes) -> None:
        """Create the object `path` in one conditional request; FileExistsError when it is there."""
        with _as_os_errors(path):
            try:
                self._fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                raise
            except Exception as error:
                if "PreconditionFailed" in repr(error) or "At least one of the pre" in str(error):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error
                raise

    def read_all(self, path: str) -> bytes:
        with _as_os_errors(path):
            data: bytes = self._fs.cat_file(path)
            return data

    def names_below(self, path: str) -> dict[str, dict[str, Any]]:
        """Objects under `path`, by their names relative to it, as the store lists them now."""
        with _as_os_errors(path):
            self._fs.invalidate_cache()
            base = str(self._fs._strip_protocol(path)).rstrip("/") + "/"
            try:
                found = self._fs.find(path, detail=True)
            except FileNotFoundError:
                return {}
            return {name.removeprefix(base): info for name, info in found.items() if name != path}

    def age_s(self, path: str) -> float:
        """Seconds since the object was written, by the store's clock and ours."""
        from datetime import UTC, datetime

        with _as_os_errors(path):
            modified: datetime = self._fs.modified(path)
        if modified.tzinfo is None:
            modified = modified.replace(tzinfo=UTC)
        return (datetime.now(UTC) - modified).total_seconds()

    # -- Fs ------------------------------------------------------------------------------------

    def mkdir(self, path: str) -> None:
        return

    def create(self, path: str, size: int) -> WriteFile:
        return _ObjectWriter(self._fs, path)

    def open_read(self, path: str) -> ReadFile:
        with _as_os_errors(path):
            self._fs.invalidate_cache()
            return _ObjectReader(self._fs, path, int(self._fs.info(path)["size"]))

    def listdir(self, path: str) -> list[Entry]:
        """Objects of one level; a checkpoint shows in its directory once it is committed."""
        return _level(self.names_below(path))

    def list_two(self, path: str) -> dict[str, tuple[Entry, ...] | None]:
        """What `listdir` finds, and for each folder what it would find in there, by one request."""
        found = self.names_below(path)
        below: dict[str, dict[str, dict[str, Any]]] = {}
        for name, info in found.items():
            folder, slash, rest = name.partition("/")
            if slash:
                below.setdefault(folder, {})[rest] = info
        return {
            entry.name: tuple(_level(below[entry.name])) if entry.kind == "dir" else None
            for entry in _level(found)
        }

    def entry(self, path: str) -> Entry | None:
        name = path.rsplit("/", 1)[-1]
        with _as_os_errors(path):
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(path)
            except FileNotFoundError:
                return None
        if info["type"] == "directory":
            return Entry(name, "dir", 0)
        return Entry(name, "file", int(info["size"]), _stamp(info))

    def unlink(self, path: str) -> None:
        with _as_os_errors(path):
            self._fs.rm_file(path)

    def rmdir(self, path: str) -> None:
        return

    def fsync_dir(self, path: str) -> None:
        return

    def fsync_file(self, path: str) -> None:
        return

    def free_bytes(self, path: str) -> int:
        return 1 << 62

    def rename_noreplace(self, src: str, dst: str) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), src)

    def link(self, src: str, dst: str) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), src)

    def clone(self, src: str, dst: str) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), src)

    def lock(self, path: str) -> Lock | None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)


def _level(found: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    """The first level of a recursive listing, by name."""
    entries = [
        Entry(name, "file", int(info["size"]), _stamp(info))
        for name, info in found.items()
        if "/" not in name
    ]
    for folder in {name.split("/", 1)[0] for name in found if "/" in name}:
        if parse_name(folder) is None or f"{folder}/{COMMIT_NAME}" in found:
            entries.append(Entry(folder, "dir", 0))
    return sorted(entries, key=lambda entry: entry.name)


def _stamp(info: Mapping[str, Any]) -> tuple[int, ...]:
    """Changes when the object is replaced: from its ETag or whatever identity the store gives."""
    keys = ("ETag", "etag", "md5Hash", "generation", "LastModified", "created", "mtime", "size")
    text = repr([info.get(key) for key in keys])
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"),)


class _ObjectWriter:
    """Uploads in blocks; what was not finished by `fsync` is thrown away by `close`."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        self._file: Any = None
        self._done = False

    def write(self, data: memoryview) -> None:
        with _as_os_errors(self._path):
            if self._file is None:
                self._file = self._fs.open(self._path, "wb", block_size=BLOCK_BYTES)
            self._file.write(data)

    def fsync(self) -> None:
        with _as_os_errors(self._path):
            if self._file is None:
                self._fs.pipe_file(self._path, b"")
            else:
                self._file.close()
            self._done = True

    def close(self) -> None:
        if self._done or self._file is None:
            return
        file, self._file = self._file, None
        with _as_os_errors(self._path):
            discard = getattr(file, "discard", None)
            if discard is not None:
                discard()
            # Or it would upload what it has when it is collected.
            file.closed = True


class _ObjectReader:
    def __init__(self, fs: Any, path: str, size: int) -> None:
        self._fs, self._path, self.size = fs, path, size
        self._position = 0
        self._block = b""
        self._block_start = 0

    def readinto(self, buffer: memoryview) -> int:
        offset = self._position - self._block_start
        if not 0 <= offset < len(self._block):
            end = min(self._position + max(BLOCK_BYTES, 1), self.size)
            if self._position >= end:
                return 0
            with _as_os_errors(self._path):
                self._block = self._fs.cat_file(self._path, start=self._position, end=end)
            self._block_start, offset = self._position, 0
        part = memoryview(self._block)[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def seek(self, offset: int) -> None:
        self._position = offset

    def close(self) -> None:
        self._block = b""
