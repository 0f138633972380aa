"""A file system in memory that can lose power after any operation.

It promises exactly what POSIX does and nothing more:

- a file's bytes are durable after `fsync` of that file; before, the disk may hold what was there
  at the last fsync, everything written, zeros of the right length, or the first half;
- a name (create, link, rename, unlink, mkdir, rmdir) is durable after `fsync_dir` of the directory
  that holds it; before, the disk may hold any subset of the changes, only that changes of one name
  arrive in order and a rename inside one directory is one change. After a rename from one directory
  to another the disk may hold the old name, the new one or both, but not neither.

`crash_states` enumerates every state that a power cut right now could leave.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from matilda_ckpt.fs import Entry, Lock


@dataclass(eq=False)
class File:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass(frozen=True)
class Change:
    """One atomic change of names in a directory: name → node, or None for gone."""

    names: tuple[tuple[str, Node | None], ...]


@dataclass(eq=False)
class Dir:
    names: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)


Node = File | Dir


def _error(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)


class MemFs:
    """`Fs` in memory. `on_operation(name, path)` runs after every operation."""

    def __init__(self, capacity: int = 1 << 40, *, clones: bool = False) -> None:
        self.top = Dir()
        self.clones = clones
        """Whether this file system can share blocks between files."""
        self.capacity = capacity
        self.operations = 0
        self.on_operation: Callable[[str, str], None] = lambda _name, _path: None
        self.fault: Callable[[str, str], None] = lambda _name, _path: None
        """Runs before every operation and may raise the error that the operation shall have."""
        self.skips: Callable[[str, str], bool] = lambda _name, _path: False
        """True makes an `fsync` or `fsync_dir` do nothing: how the seeded bugs are made."""
        self._locks: dict[int, _MemLock] = {}
        self._moves: list[tuple[str, str]] = []

    # -- Fs ------------------------------------------------------------------------------------

    def mkdir(self, path: str) -> None:
        self.fault("mkdir", path)
        parent, name = self._parent(path)
        if name in parent.names:
            raise _error(errno.EEXIST, path)
        self._change(parent, (name, Dir()))
        self._did("mkdir", path)

    def create(self, path: str, size: int) -> _MemWriter:
        self.fault("create", path)
        parent, name = self._parent(path)
        if name in parent.names:
            raise _error(errno.EEXIST, path)
        if size > self.free_bytes(path):
            raise _error(errno.ENOSPC, path)
        file = File(bytearray(size))
        self._change(parent, (name, file))
        self._did("create", path)
        return _MemWriter(self, file, path)

    def open_read(self, path: str) -> _MemReader:
        node = self._find(path)
        if not isinstance(node, File):
            raise _error(errno.EINVAL if node else errno.ENOENT, path)
        return _MemReader(bytes(node.data))

    def listdir(self, path: str) -> list[Entry]:
        node = self._dir(path)
        return [_entry(name, child) for name, child in sorted(node.names.items())]

    def entry(self, path: str) -> Entry | None:
        node = self._find(path)
        return None if node is None else _entry(os.path.basename(path), node)  # noqa: PTH119

    def rename_noreplace(self, src: str, dst: str) -> None:
        self.fault("rename", dst)
        from_dir, from_name = self._parent(src)
        to_dir, to_name = self._parent(dst)
        if from_name not in from_dir.names:
            raise _error(errno.ENOENT, src)
        if to_name in to_dir.names:
            raise _error(errno.EEXIST, dst)
        node = from_dir.names[from_name]
        if from_dir is to_dir:
            self._change(from_dir, (from_name, None), (to_name, node))
        else:
            self._change(to_dir, (to_name, node))
            self._change(from_dir, (from_name, None))
            self._moves.append((src, dst))
        self._did("rename", dst)

    def fsync_dir(self, path: str) -> None:
        self.fault("fsync_dir", path)
        node = self._dir(path)
        if not self.skips("fsync_dir", path):
            node.durable = dict(node.names)
            node.pending.clear()
            self._moves = [m for m in self._moves if m[1].rpartition("/")[0] != path]
        self._did("fsync_dir", path)

    def unlink(self, path: str) -> None:
        self.fault("unlink", path)
        parent, name = self._parent(path)
        if not isinstance(parent.names.get(name), File):
            raise _error(errno.ENOENT, path)
        self._change(parent, (name, None))
        self._did("unlink", path)

    def rmdir(self, path: str) -> None:
        self.fault("rmdir", path)
        parent, name = self._parent(path)
        node = parent.names.get(name)
        if not isinstance(node, Dir):
            raise _error(errno.ENOENT, path)
        if node.names:
            raise _error(errno.ENOTEMPTY, path)
        self._change(parent, (name, None))
        self._did("rmdir", path)

    def link(self, src: str, dst: str) -> None:
        self.fault("link", dst)
        node, parent, name = self._file_and_new_name(src, dst)
        self._change(parent, (name, node))
        self._did("link", dst)

    def clone(self, src: str, dst: str) -> None:
        if not self.clones:
            raise _error(errno.EOPNOTSUPP, dst)
        self.fault("clone", dst)
        node, parent, name = self._file_and_new_name(src, dst)
        self._change(parent, (name, File(bytearray(node.data))))
        self._did("clone", dst)

    def _file_and_new_name(self, src: str, dst: str) -> tuple[File, Dir, str]:
        node = self._find(src)
        parent, name = self._parent(dst)
        if not isinstance(node, File):
            raise _error(errno.ENOENT, src)
        if name in parent.names:
            raise _error(errno.EEXIST, dst)
        return node, parent, name

    def fsync_file(self, path: str) -> None:
        self.fault("fsync", path)
        node = self._find(path)
        if not isinstance(node, File):
            raise _error(errno.ENOENT, path)
        if not self.skips("fsync", path):
            node.durable = bytes(node.data)
        self._did("fsync", path)

    def free_bytes(self, path: str) -> int:
        return self.capacity - sum(len(file.data) for file in _files(self.top))

    def lock(self, path: str) -> Lock | None:
        parent, name = self._parent(path)
        node = parent.names.get(name)
        if node is None:
            node = File()
            self._change(parent, (name, node))
        assert isinstance(node, File)
        if id(node) in self._locks:
            return None
        held = _MemLock(self, path, node)
        self._locks[id(node)] = held
        self._did("lock", path)
        return held

    # -- crash ---------------------------------------------------------------------------------

    def crash_states(self) -> Iterator[MemFs]:
        """Every distinct tree that could be on disk after a power cut now.

        Inside directories whose name begins with a dot only the two extremes are enumerated:
        no reader opens them, so that what is inside can only be removed.
        """
        for tree in _dir_states(self.top, visible=True):
            fresh = MemFs(self.capacity, clones=self.clones)
            fresh.top = _built(tree)
            if all(fresh._find(src) or fresh._find(dst) for src, dst in self._moves):
                yield fresh

    # -- inside --------------------------------------------------------------------------------

    def _did(self, name: str, path: str) -> None:
        self.operations += 1
        self.on_operation(name, path)

    def _change(self, parent: Dir, *names: tuple[str, Node | None]) -> None:
        parent.pending.append(Change(names))
        for name, node in names:
            if node is None:
                del parent.names[name]
            else:
                parent.names[name] = node

    def _find(self, path: str) -> Node | None:
        node: Node | None = self.top
        for part in path.strip("/").split("/"):
            if part:
                node = node.names.get(part) if isinstance(node, Dir) else None
        return node

    def _dir(self, path: str) -> Dir:
        node = self._find(path)
        if not isinstance(node, Dir):
            raise _error(errno.ENOENT, path)
        return node

    def _parent(self, path: str) -> tuple[Dir, str]:
        folder, _, name = path.rstrip("/").rpartition("/")
        return self._dir(folder), name


class _MemWriter:
    def __init__(self, fs: MemFs, file: File, path: str) -> None:
        self._fs, self._file, self._path = fs, file, path
        self._position = 0

    def write(self, data: memoryview) -> None:
        self._fs.fault("write", self._path)
        end = self._position + len(data)
        self._file.data[self._position : end] = data
        self._position = end
        self._fs._did("write", self._path)

    def fsync(self) -> None:
        self._fs.fault("fsync", self._path)
        if not self._fs.skips("fsync", self._path):
            self._file.durable = bytes(self._file.data)
        self._fs._did("fsync", self._path)

    def close(self) -> None:
        return


class _MemReader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self.size = len(data)

    def readinto(self, buffer: memoryview) -> int:
        chunk = self._data[self._position : self._position + len(buffer)]
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)

    def seek(self, offset: int) -> None:
        self._position = offset

    def close(self) -> None:
        return


class _MemLock:
    def __init__(self, fs: MemFs, path: str, file: File) -> None:
        self._fs, self._path, self._file = fs, path, file

    def read(self) -> bytes:
        return bytes(self._file.data) if self._fs._find(self._path) is self._file else b""

    def write(self, data: bytes) -> None:
        self._file.data[:] = data
        self._file.durable = bytes(data)
        self._fs._did("fsync", self._path)

    def release(self) -> None:
        self._fs._locks.pop(id(self._file), None)


def _entry(name: str, node: Node) -> Entry:
    if isinstance(node, Dir):
        return Entry(name, "dir", 0, (id(node),))
    return Entry(name, "file", len(node.data), (id(node), hash(bytes(node.data))))


def _files(folder: Dir) -> Iterator[File]:
    for node in folder.names.values():
        if isinstance(node, File):
            yield node
        else:
            yield from _files(node)


# A tree on disk: bytes for a file, a tuple of (name, tree) for a directory.
Tree = bytes | tuple[tuple[str, "Tree"], ...]


def _dir_states(folder: Dir, *, visible: bool) -> list[Tree]:
    states: dict[Tree, None] = {}
    for names in _name_states(folder, every=visible):
        choices = [
            [(name, tree) for tree in _node_states(node, visible and not name.startswith("."))]
            for name, node in sorted(names.items())
        ]
        for picked in itertools.product(*choices):
            states[tuple(picked)] = None
    return list(states)


def _node_states(node: Node, visible: bool) -> list[Tree]:
    if isinstance(node, Dir):
        return _dir_states(node, visible=visible)
    full = bytes(node.data)
    options: dict[Tree, None] = {full: None, node.durable: None}
    if visible and full != node.durable:
        options[bytes(len(full))] = None
        options[full[: len(full) // 2]] = None
    return list(options)


def _name_states(folder: Dir, *, every: bool) -> list[dict[str, Node]]:
    """Durable names plus each subset of the pending changes that keeps every name's order."""
    count = len(folder.pending)
    if not every:
        return [folder.durable, folder.names] if count else [folder.durable]
    found: dict[tuple[tuple[str, int], ...], dict[str, Node]] = {}
    for bits in range(1 << count):
        applied = [folder.pending[i] for i in range(count) if bits >> i & 1]
        if any(_comes_after_a_skipped_one(folder, i, bits) for i in range(count) if bits >> i & 1):
            continue
        names = dict(folder.durable)
        for change in applied:
            for name, node in change.names:
                if node is None:
                    names.pop(name, None)
                else:
                    names[name] = node
        found[tuple(sorted((name, id(node)) for name, node in names.items()))] = names
    return list(found.values())


def _comes_after_a_skipped_one(folder: Dir, index: int, bits: int) -> bool:
    mine = {name for name, _ in folder.pending[index].names}
    return any(
        not bits >> j & 1 and mine & {name for name, _ in folder.pending[j].names}
        for j in range(index)
    )


def _built(tree: Tree) -> Dir:
    assert isinstance(tree, tuple)
    folder = Dir()
    for name, child in tree:
        node: Node = File(bytearray(child), child) if isinstance(child, bytes) else _built(child)
        folder.names[name] = node
    folder.durable = dict(folder.names)
    return folder
