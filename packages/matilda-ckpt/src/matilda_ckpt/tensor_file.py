"""safetensors files, written and read as streams that are hashed on the way. No torch here.

Format (https://huggingface.co/docs/safetensors): u64 little-endian header length, JSON header
padded with spaces to a multiple of 8, then the tensors back to back. The library's own writer
needs the whole file in memory at once and computes no hash, hence this one; any safetensors
reader opens the result.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from matilda_ckpt import strict_json
from matilda_ckpt.fs import Fs, ReadFile, WriteFile, read_exactly, reading
from matilda_ckpt.manifest import DTYPE_BITS, FileEntry, TensorEntry, tree_sha256

CHUNK_BYTES = 1 << 20
"""Read, hashed and written at a time: small enough to stay in a cache on the way."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: `read()` yields its bytes (little-endian, row-major) in pieces."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[memoryview]]

    @property
    def nbytes(self) -> int:
        count = 1
        for dim in self.shape:
            count *= dim
        return count * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class TensorFilePlan:
    """Header and offsets of one file, known before a byte is written."""

    tensors: tuple[TensorSource, ...]
    header: bytes
    size: int


def plan_tensor_file(tensors: Sequence[TensorSource]) -> TensorFilePlan:
    # Widest dtype first keeps every tensor aligned to its element size.
    ordered = tuple(sorted(tensors, key=lambda t: -DTYPE_BITS[t.dtype]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-len(text) % 8)
    full = struct.pack("<Q", len(text)) + text
    return TensorFilePlan(ordered, full, len(full) + position)


def write_tensor_file(
    file: WriteFile, plan: TensorFilePlan, alive: Callable[[], None] = lambda: None
) -> FileEntry:
    """Write and hash in one pass, fsync, close. `alive` runs between chunks and may raise."""
    file.write(memoryview(plan.header))
    entries: dict[str, TensorEntry] = {}
    position = 0
    for tensor in plan.tensors:
        digest = hashlib.sha256()
        end = position
        for chunk in chunks(tensor.read()):
            alive()
            digest.update(chunk)
            file.write(chunk)
            end += len(chunk)
        if end - position != tensor.nbytes:
            raise ValueError(
                f"tensor {tensor.name!r} gave {end - position} bytes instead of {tensor.nbytes}"
            )
        entries[tensor.name] = TensorEntry(
            tensor.dtype, tensor.shape, position, end, digest.hexdigest()
        )
        position = end
    file.fsync()
    file.close()
    return tensor_file_entry(plan, entries)


def tensor_file_entry(plan: TensorFilePlan, entries: Mapping[str, TensorEntry]) -> FileEntry:
    header_sha256 = hashlib.sha256(plan.header).hexdigest()
    return FileEntry(
        size=plan.size,
        sha256=tree_sha256(header_sha256, entries),
        header_size=len(plan.header),
        header_sha256=header_sha256,
        tensors=entries,
    )


def chunks(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    for piece in pieces:
        for start in range(0, len(piece), CHUNK_BYTES):
            yield piece[start : start + CHUNK_BYTES]


def write_bytes_file(file: WriteFile, data: bytes) -> FileEntry:
    file.write(memoryview(data))
    file.fsync()
    file.close()
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_tensor_file(
    fs: Fs,
    path: str,
    entry: FileEntry,
    allocate: Callable[[str, TensorEntry], memoryview | None],
    problem: Callable[[str], Exception],
) -> None:
    """Read every tensor into the buffer that `allocate` gives and verify those very bytes.

    A None buffer means "check it, but I do not want it". `problem(text)` makes the exception.
    """
    with reading(fs, path) as file:
        if file.size != entry.size:
            raise problem(f"is {file.size} bytes instead of {entry.size}")
        header = bytearray(entry.header_size)
        n = read_exactly(file, memoryview(header))
        if n != len(header) or hashlib.sha256(header).hexdigest() != entry.header_sha256:
            raise problem("has a damaged header (SHA-256 differs)")
        difference = header_difference(bytes(header), entry)
        if difference:
            raise problem(difference)
        scratch = bytearray(0)
        for name, tensor in sorted(entry.tensors.items(), key=lambda kv: (kv[1].start, kv[1].end)):
            buffer = allocate(name, tensor)
            if buffer is None:
                if not scratch:
                    scratch = bytearray(CHUNK_BYTES)
                digest = _hash_only(file, tensor.end - tensor.start, memoryview(scratch))
            else:
                digest = _read_hashed(file, buffer)
            if digest != tensor.sha256:
                raise problem(f"has a damaged tensor {name!r} (SHA-256 differs)")


def read_one_tensor(fs: Fs, path: str, entry: FileEntry, key: str, buffer: memoryview) -> bool:
    """Read one tensor into `buffer`; whether those bytes have its SHA-256."""
    tensor = entry.tensors[key]
    with reading(fs, path) as file:
        file.seek(entry.header_size + tensor.start)
        return _read_hashed(file, buffer) == tensor.sha256


def header_difference(header: bytes, entry: FileEntry) -> str | None:
    """What contradicts the manifest in a safetensors header, or None."""
    try:
        (length,) = struct.unpack_from("<Q", header)
        if length + 8 != len(header):
            return "has a header of another length than the manifest says"
        raw = strict_json.loads(header[8:], "safetensors header")
    except (struct.error, ValueError) as error:
        return f"has no readable header ({error})"
    if not isinstance(raw, dict):
        return "has a header that is not a JSON object"
    expected: Mapping[str, object] = {
        name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.end]}
        for name, t in entry.tensors.items()
    }
    found = {name: value for name, value in raw.items() if name != "__metadata__"}
    return None if found == expected else "has a header that contradicts the manifest"


def _read_hashed(file: ReadFile, buffer: memoryview) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(buffer), CHUNK_BYTES):
        chunk = buffer[start : start + CHUNK_BYTES]
        if read_exactly(file, chunk) != len(chunk):
            return ""
        digest.update(chunk)
    return digest.hexdigest()


def _hash_only(file: ReadFile, nbytes: int, scratch: memoryview) -> str:
    digest = hashlib.sha256()
    while nbytes:
        chunk = scratch[: min(nbytes, len(scratch))]
        if read_exactly(file, chunk) != len(chunk):
            return ""
        digest.update(chunk)
        nbytes -= len(chunk)
    return digest.hexdigest()
