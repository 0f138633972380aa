"""Linux system calls that Python does not offer; each says so where it is not available."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from typing import Any

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_SYNC_FILE_RANGE_WRITE = 2
_FICLONE = 0x40049409
UNSUPPORTED = frozenset(
    {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EPERM}
)
"""Error codes that mean "not here", not "the disk failed"."""


@functools.cache
def _call(name: str) -> Any:
    """The C library's function, or None. Called through ctypes, it releases the GIL."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def rename_noreplace(src: str, dst: str) -> bool:
    """`renameat2(RENAME_NOREPLACE)`: True when done, False when this system cannot."""
    call = _call("renameat2")
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), src, None, dst)


def reserve_space(fd: int, nbytes: int) -> bool:
    """`fallocate(2)`: True when the file has room for `nbytes`, False when this system cannot tell.

    Not `posix_fallocate`: where the file system cannot, the C library writes into every block.
    """
    # With the 64-bit offsets that musl's only form, and that of 64-bit systems, takes anyway.
    call = _call("fallocate64") or _call("fallocate")
    if call is None:
        return False
    while call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def start_writeback(fd: int, offset: int, nbytes: int) -> bool:
    """Ask the kernel to begin writing these bytes to disk; promises nothing about durability.

    False where it cannot be asked. A real I/O error is raised: that file is dead.
    """
    call = _call("sync_file_range")
    if call is None:
        return False
    start, length = ctypes.c_int64(offset), ctypes.c_int64(nbytes)
    if call(fd, start, length, _SYNC_FILE_RANGE_WRITE) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED or code == errno.ESPIPE:
        return False
    if code == errno.EINTR:
        return True
    raise OSError(code, os.strerror(code))


def clone_file(source_fd: int, target_fd: int) -> None:
    """`FICLONE`: make the target share the source's blocks; OSError where that cannot be."""
    if sys.platform != "linux":
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    import fcntl

    fcntl.ioctl(target_fd, _FICLONE, source_fd)
