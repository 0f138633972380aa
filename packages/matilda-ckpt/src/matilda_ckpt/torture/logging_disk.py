"""A block device that remembers every write and flush, made of FUSE and a loop device.

The kernel's dm-log-writes needs device-mapper; this needs root, /dev/fuse and a free /dev/loopN.
One regular file is mounted by speaking the FUSE protocol (version 7) directly, a loop device is
put on it, and every request that reaches the file is logged in the order in which it completed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

_GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _STATFS, _RELEASE = 3, 4, 14, 15, 16, 17, 18
_FSYNC, _FLUSH, _INIT, _DESTROY, _FORGET, _BATCH_FORGET, _INTERRUPT = 20, 25, 26, 38, 2, 42, 36
_HEADER = struct.Struct("<IIQQIIII")
_MAX_WRITE = 128 << 10
_DIRECT_IO = 1
_BIG_WRITES = 1 << 5


def why_not() -> str | None:
    """Why this machine cannot make such a device, or None."""
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/fuse").exists():
        return "needs /dev/fuse"
    if not Path("/dev/loop-control").exists():
        return "needs loop devices"
    for tool in ("losetup", "mount", "umount", "mkfs.ext4"):
        if shutil.which(tool) is None:
            return f"needs `{tool}`"
    return None


class LoggingDisk:
    """A device of `size` bytes; `log` holds (offset, data) for a write and None for a flush."""

    def __init__(self, work: Path, size: int) -> None:
        self.size = size
        self.log: list[tuple[int, bytes] | None] = []
        self._data = bytearray(size)
        self._file = work / "disk"
        self._file.touch()
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=100000,user_id=0,group_id=0,allow_other"
        libc = ctypes.CDLL(None, use_errno=True)
        target = os.fsencode(self._file)
        if libc.mount(b"matilda-log", target, b"fuse", 0, options.encode()) != 0:
            code = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(code, f"cannot mount FUSE: {os.strerror(code)}")
        self._server = threading.Thread(target=self._serve, name="logging-disk", daemon=True)
        self._server.start()
        self.device = _run("losetup", "-f", "--show", "--direct-io=off", str(self._file))

    def __enter__(self) -> LoggingDisk:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        subprocess.run(["losetup", "-d", self.device], check=False)
        subprocess.run(["umount", "-l", str(self._file)], check=False)
        self._server.join(5)
        os.close(self._fd)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fd, _MAX_WRITE + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return  # ENODEV: unmounted
            _, opcode, unique, _, _, _, _, _ = _HEADER.unpack_from(request)
            if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            body = request[_HEADER.size :]
            code, reply = self._answer(opcode, body)
            os.write(self._fd, struct.pack("<IiQ", 16 + len(reply), -code, unique) + reply)
            if opcode == _DESTROY:
                return

    def _answer(self, opcode: int, body: bytes) -> tuple[int, bytes]:
        if opcode == _INIT:
            head = struct.pack("<IIIIHHIIHHI", 7, 31, 0, _BIG_WRITES, 12, 9, _MAX_WRITE, 1, 0, 0, 0)
            return 0, head + bytes(28)
        if opcode in (_GETATTR, _SETATTR):
            return 0, self._attributes()
        if opcode == _OPEN:
            return 0, struct.pack("<QII", 1, _DIRECT_IO, 0)
        if opcode == _READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return 0, bytes(self._data[offset : offset + size])
        if opcode == _WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            data = body[40 : 40 + size]
            self._data[offset : offset + size] = data
            self.log.append((offset, data))
            return 0, struct.pack("<II", size, 0)
        if opcode == _FSYNC:
            self.log.append(None)
            return 0, b""
        if opcode in (_FLUSH, _RELEASE, _DESTROY):
            return 0, b""
        if opcode == _STATFS:
            return 0, struct.pack("<QQQQQIIII", 1, 0, 0, 1, 0, 4096, 255, 4096, 0) + bytes(24)
        return errno.ENOSYS, b""

    def _attributes(self) -> bytes:
        times = (0, 0, 0)
        return struct.pack(
            "<QII6Q10I",
            *(3600, 0, 0),
            *(1, self.size, self.size // 512, *times),
            *(*times, 0o100600, 1, 0, 0, 0, 4096, 0),
        )


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(errno.EIO, f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()
