"""The only door to the disk: a small set of operations with exact durability meaning.

`OsFs` is the real thing. `matilda_ckpt.torture.memfs.MemFs` implements the same protocol with
separate durable and volatile state, so that the commit protocol can be crashed at every step.
Nothing here imports torch.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from matilda_ckpt import system_calls
from matilda_ckpt.forked import call_in_forked_child

WRITEBACK_BYTES = 8 << 20
"""The disk is set to work each time that this many bytes have been written."""
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


@dataclass(frozen=True)
class Entry:
    """One directory entry, never following a symbolic link."""

    name: str
    kind: str
    """"file", "dir" or "other" (links, sockets, devices)."""
    size: int
    """Bytes, for files; 0 otherwise."""
    stamp: tuple[int, ...] = ()
    """Identity of the content for caches: (device, inode, mtime_ns, ctime_ns)."""


class WriteFile(Protocol):
    """A file that exists only since `create`; nothing in it is durable before `fsync` returns."""

    def write(self, data: memoryview) -> None:
        """Append all of `data` (short writes are continued); OSError on failure."""

    def fsync(self) -> None:
        """Make the content and size durable (not the name: that is `fsync_dir`)."""

    def close(self) -> None:
        """Close; an error here is an error of the save."""


class ReadFile(Protocol):
    size: int

    def readinto(self, buffer: memoryview) -> int:
        """Read up to `len(buffer)` bytes; 0 at end of file."""

    def seek(self, offset: int) -> None: ...

    def close(self) -> None: ...


class Fs(Protocol):
    """Paths are strings. Every method raises `OSError` (or a subclass) on failure."""

    def mkdir(self, path: str) -> None: ...

    def create(self, path: str, size: int) -> WriteFile:
        """New file, never an existing one; `size` bytes are reserved so that a full disk shows."""

    def open_read(self, path: str) -> ReadFile:
        """An existing regular file; symbolic links and devices are refused."""

    def listdir(self, path: str) -> list[Entry]: ...

    def entry(self, path: str) -> Entry | None:
        """What `path` is, or None when there is nothing."""

    def rename_noreplace(self, src: str, dst: str) -> None:
        """Atomic; FileExistsError when `dst` exists."""

    def fsync_dir(self, path: str) -> None: ...

    def unlink(self, path: str) -> None: ...

    def rmdir(self, path: str) -> None: ...

    def link(self, src: str, dst: str) -> None:
        """Hard link; OSError where the file system has none."""

    def clone(self, src: str, dst: str) -> None:
        """New file that shares the blocks of `src`; OSError where the file system cannot."""

    def fsync_file(self, path: str) -> None:
        """Make the content of an existing file durable (not its name)."""

    def free_bytes(self, path: str) -> int: ...

    def lock(self, path: str) -> Lock | None:
        """Exclusive, released by the kernel when the process dies; None when someone holds it."""


class Lock(Protocol):
    def read(self) -> bytes:
        """Content of the lock file as its *name* shows it now (b"" when the name is gone)."""

    def write(self, data: bytes) -> None: ...

    def release(self) -> None: ...


class _OsWriteFile:
    def __init__(self, fd: int, writeback_bytes: int) -> None:
        self._fd = fd
        self._writeback_bytes = writeback_bytes
        self._written = self._started = 0

    def write(self, data: memoryview) -> None:
        view = data.cast("B") if data.format != "B" or data.ndim != 1 else data
        while len(view):
            n = os.write(self._fd, view)
            if n <= 0:
                raise OSError(errno.EIO, "write made no progress")
            view = view[n:]
            self._written += n
        waiting = self._written - self._started
        if waiting >= self._writeback_bytes:
            # Or the disk would idle until `fsync` and everything would wait for it then.
            if not system_calls.start_writeback(self._fd, self._started, waiting):
                self._writeback_bytes = 1 << 62
            self._started = self._written

    def fsync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _OsReadFile:
    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.size = size

    def readinto(self, buffer: memoryview) -> int:
        return os.readv(self._fd, [buffer])

    def seek(self, offset: int) -> None:
        os.lseek(self._fd, offset, os.SEEK_SET)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _OsLock:
    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd
        # A forked child (a data worker) must not keep the lock alive after this process dies.
        call_in_forked_child(self.release)

    def read(self) -> bytes:
        try:
            named, held = os.stat(self._path), os.fstat(self._fd)  # noqa: PTH116
        except OSError:
            return b""
        if (named.st_dev, named.st_ino) != (held.st_dev, held.st_ino):
            return b""
        return os.pread(self._fd, 4096, 0)

    def write(self, data: bytes) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)
        os.fsync(self._fd)

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.release()


class OsFs:
    """`Fs` over the operating system."""

    writeback_bytes = WRITEBACK_BYTES

    def mkdir(self, path: str) -> None:
        os.mkdir(path)  # noqa: PTH102

    def create(self, path: str, size: int) -> WriteFile:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | _NO_FOLLOW
        fd = os.open(path, flags, 0o644)
        try:
            if size > 0:
                # A file system that cannot is no reason to fail: writes will tell.
                system_calls.reserve_space(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return _OsWriteFile(fd, self.writeback_bytes)

    def open_read(self, path: str) -> ReadFile:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _NO_FOLLOW | os.O_NONBLOCK)
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", path)
        return _OsReadFile(fd, info.st_size)

    def listdir(self, path: str) -> list[Entry]:
        found = []
        with os.scandir(path) as entries:
            for item in entries:
                try:
                    found.append(_entry(item.name, item.stat(follow_symlinks=False)))
                except FileNotFoundError:  # removed while we were listing
                    continue
        return sorted(found, key=lambda entry: entry.name)

    def entry(self, path: str) -> Entry | None:
        try:
            return _entry(os.path.basename(path), os.lstat(path))  # noqa: PTH119
        except (FileNotFoundError, NotADirectoryError):
            return None

    def rename_noreplace(self, src: str, dst: str) -> None:
        if system_calls.rename_noreplace(src, dst):
            return
        # The lock is held, so check-then-rename can only race with a stranger; a directory
        # rename still fails on a non-empty target.
        if os.path.lexists(dst):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), dst)
        os.rename(src, dst)  # noqa: PTH104

    def fsync_dir(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: str) -> None:
        os.unlink(path)  # noqa: PTH108

    def rmdir(self, path: str) -> None:
        os.rmdir(path)  # noqa: PTH106

    def link(self, src: str, dst: str) -> None:
        os.link(src, dst, follow_symlinks=False)

    def clone(self, src: str, dst: str) -> None:
        source = os.open(src, os.O_RDONLY | os.O_CLOEXEC | _NO_FOLLOW)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | _NO_FOLLOW
            target = os.open(dst, flags, 0o644)
            try:
                system_calls.clone_file(source, target)
            except BaseException:
                os.unlink(dst)  # noqa: PTH108
                raise
            finally:
                os.close(target)
        finally:
            os.close(source)

    def fsync_file(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _NO_FOLLOW)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self, path: str) -> int:
        info = os.statvfs(path)
        return info.f_bavail * info.f_frsize

    def lock(self, path: str) -> Lock | None:
        import fcntl

        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | _NO_FOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return _OsLock(path, fd)


def _entry(name: str, info: os.stat_result) -> Entry:
    if stat.S_ISREG(info.st_mode):
        kind, size = "file", info.st_size
    elif stat.S_ISDIR(info.st_mode):
        kind, size = "dir", 0
    else:
        kind, size = "other", 0
    return Entry(name, kind, size, (info.st_dev, info.st_ino, info.st_mtime_ns, info.st_ctime_ns))


@contextmanager
def reading(fs: Fs, path: str) -> Iterator[ReadFile]:
    file = fs.open_read(path)
    try:
        yield file
    finally:
        file.close()


def read_exactly(file: ReadFile, buffer: memoryview) -> int:
    """Fill `buffer` as far as the file goes; returns the bytes read."""
    done = 0
    while done < len(buffer):
        n = file.readinto(buffer[done:])
        if n <= 0:
            break
        done += n
    return done


def read_small(fs: Fs, path: str, limit: int) -> bytes:
    """Whole content of a file of at most `limit` bytes; ValueError when it is larger."""
    with reading(fs, path) as file:
        if file.size > limit:
            raise ValueError(f"{file.size} bytes, more than the {limit} allowed")
        buffer = bytearray(file.size)
        n = read_exactly(file, memoryview(buffer))
        return bytes(buffer[:n])


def remove_tree(fs: Fs, path: str, *, depth: int = 0) -> None:
    """Remove a directory of ours; links are unlinked, never followed."""
    if depth > 64:
        raise OSError(errno.ELOOP, "directory nested too deeply", path)
    for entry in fs.listdir(path):
        child = f"{path}/{entry.name}"
        if entry.kind == "dir":
            remove_tree(fs, child, depth=depth + 1)
        else:
            fs.unlink(child)
    fs.rmdir(path)
