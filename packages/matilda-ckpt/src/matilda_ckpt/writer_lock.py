"""One writer per directory: a kernel lock, and a fence against a writer that lost it.

The kernel releases the lock when its owner dies, however it dies. Where locks are not reliable
(some network file systems), the token in the file still tells a zombie, right before it would
publish, that someone else has taken over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets

from matilda_ckpt import strict_json
from matilda_ckpt.catalog import one_of_them
from matilda_ckpt.errors import LockedError
from matilda_ckpt.fs import Fs, Lock, remove_tree
from matilda_ckpt.manifest import COMMIT_NAME, MANIFEST_NAME

LOCK_NAME = "LOCK"
TEMP_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
_NOT_OURS_TO_SYNC = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EROFS, errno.EOPNOTSUPP}
"""Errors of a directory above ours that we may not open, or that lives on something read-only."""


class WriterLock:
    """Exclusive right to write to `root`."""

    def __init__(self, fs: Fs, root: str, run_id: str) -> None:
        self._fs = fs
        self._root = root
        self._run_id = run_id
        self._lock: Lock | None = None
        self._token = b""

    def acquire(self) -> None:
        """Become the only writer and clear what dead writers left; LockedError otherwise.

        ValueError when the root is itself a checkpoint, which a lock file would damage.
        """
        if self._lock is not None:
            return
        self._check_root()
        self._make_root()
        lock = self._fs.lock(f"{self._root}/{LOCK_NAME}")
        if lock is None:
            raise LockedError(
                f"another process is writing checkpoints to `{self._root}`; "
                "stop it, or give this run a directory of its own"
            )
        self._token = strict_json.dumps(
            {"pid": os.getpid(), "run_id": self._run_id, "token": secrets.token_hex(8)}
        )
        try:
            lock.write(self._token)
            # What we can see now is durable from here on, whoever wrote it.
            self._fs.fsync_dir(self._root)
            self._clear_leftovers()
        except BaseException:
            lock.release()
            raise
        self._lock = lock

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check(self) -> None:
        """LockedError unless this process is still the writer."""
        if self._lock is None or self._lock.read() != self._token:
            raise LockedError(
                f"another process has taken over `{self._root}`; this one stops writing to it"
            )

    def _check_root(self) -> None:
        if all(self._fs.entry(f"{self._root}/{name}") for name in (COMMIT_NAME, MANIFEST_NAME)):
            raise ValueError(one_of_them(self._root))

    def _make_root(self) -> None:
        above = [self._root]
        while (parent := os.path.dirname(above[-1])) != above[-1]:  # noqa: PTH120
            above.append(parent)
        for path in reversed(above):
            if self._fs.entry(path) is None:
                with contextlib.suppress(FileExistsError):
                    self._fs.mkdir(path)
        # All the way up, and every time: an earlier attempt may have died between mkdir and fsync.
        for path in above[1:]:
            try:
                self._fs.fsync_dir(path)
            except OSError as error:
                if error.errno not in _NOT_OURS_TO_SYNC:
                    raise

    def _clear_leftovers(self) -> None:
        for entry in self._fs.listdir(self._root):
            if entry.name.startswith((TEMP_PREFIX, TRASH_PREFIX)) and entry.kind == "dir":
                remove_tree(self._fs, f"{self._root}/{entry.name}")
