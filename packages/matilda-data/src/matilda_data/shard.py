"""Token shards: the llm.c / modded-nanogpt `.bin` with hashes in header words they ignore.

    word 0     20240520, the llm.c magic        word 3      "MATL"
    word 1     1, the version                   word 4      1, version of this extension
    word 2     tokens                           word 5      shard number within its split
                                                word 6      documents that begin in this shard
                                                words 7, 8  vocabulary size, end-of-text id
                                                words 10-17 SHA-256 of the payload
                                                words 18-25 SHA-256 of the vocabulary
                                                words 248-255 SHA-256 of header bytes 0-991

256 little-endian int32 words, then little-endian uint16 tokens.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.errors import DataError
from matilda_data.manifest import CHUNK_BYTES

__all__ = ["HEADER_BYTES", "ShardHeader", "ShardWriter", "file_sha256", "read_header"]

HEADER_BYTES = 1024
MAGIC = 20240520
VERSION = 1
EXTENSION_TAG = int.from_bytes(b"MATL", "little")
EXTENSION_VERSION = 1
MAX_TOKENS = 2**31 - 1
CHECKSUM_OFFSET = 992


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """The header of a shard; the fields after `tokens` are None without our extension."""

    tokens: int
    number: int | None = None
    documents: int | None = None
    vocab_size: int | None = None
    eot_id: int | None = None
    payload_sha256: str | None = None
    tokenizer_sha256: str | None = None

    def plain_bytes(self) -> bytes:
        """The 1,024 header bytes that llm.c writes: no extension."""
        words = np.zeros(256, dtype="<i4")
        words[:3] = MAGIC, VERSION, self.tokens
        return words.tobytes()

    def to_bytes(self) -> bytes:
        """The 1,024 header bytes, extension included."""
        words = np.zeros(256, dtype="<i4")
        words[:3] = MAGIC, VERSION, self.tokens
        words[3:9] = [
            EXTENSION_TAG,
            EXTENSION_VERSION,
            self.number or 0,
            self.documents or 0,
            self.vocab_size or 0,
            self.eot_id or 0,
        ]
        words[10:18] = np.frombuffer(bytes.fromhex(self.payload_sha256 or "00" * 32), dtype="<i4")
        words[18:26] = np.frombuffer(bytes.fromhex(self.tokenizer_sha256 or "00" * 32), dtype="<i4")
        raw = words.tobytes()[:CHECKSUM_OFFSET]
        return raw + hashlib.sha256(raw).digest()


def parse_header(raw: bytes, name: str) -> ShardHeader:
    """The header in `raw` (at least 1,024 bytes); `name` is used in errors."""
    if len(raw) < HEADER_BYTES:
        raise DataError(f"shard {name!r} is truncated: it has no whole header")
    raw = raw[:HEADER_BYTES]
    words = np.frombuffer(raw, dtype="<i4")
    if words[0] != MAGIC or words[1] != VERSION or words[2] < 0:
        raise DataError(f"{name!r} is not a uint16 token shard (llm.c format, version 1)")
    if words[3] != EXTENSION_TAG:
        return ShardHeader(tokens=int(words[2]))
    if hashlib.sha256(raw[:CHECKSUM_OFFSET]).digest() != raw[CHECKSUM_OFFSET:]:
        raise DataError(f"the header of shard {name!r} is damaged; restore it or prepare it again")
    if words[4] != EXTENSION_VERSION:
        raise DataError(f"shard {name!r} has header extension version {int(words[4])}, not 1")
    return ShardHeader(
        tokens=int(words[2]),
        number=int(words[5]),
        documents=int(words[6]),
        vocab_size=int(words[7]),
        eot_id=int(words[8]),
        payload_sha256=words[10:18].tobytes().hex(),
        tokenizer_sha256=words[18:26].tobytes().hex(),
    )


def read_header(path: Path) -> ShardHeader:
    """The header of the shard at `path`, its checksum and the file's length checked.

    Raises:
        DataError: missing, unreadable, not a shard, damaged header, or another length than stated.
    """
    try:
        with path.open("rb") as file:
            header = parse_header(file.read(HEADER_BYTES), str(path))
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise DataError(
            f"shard {str(path)!r} is missing; restore it or prepare the data set again"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read shard {str(path)!r}: {error.strerror}") from None
    expected = HEADER_BYTES + 2 * header.tokens
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise DataError(
            f"shard {str(path)!r} is {state}: {size} bytes where its header says {expected}; "
            "restore it or prepare the data set again"
        )
    return header


class ShardWriter:
    """Writes one shard to `path` (no temporary name: the caller renames) and hashes on the way."""

    def __init__(
        self, path: Path, *, number: int, vocab_size: int, eot_id: int, tokenizer_sha256: str
    ) -> None:
        self.path = path
        self.tokens = 0
        self.documents = 0
        self._blank = ShardHeader(
            tokens=0,
            number=number,
            vocab_size=vocab_size,
            eot_id=eot_id,
            tokenizer_sha256=tokenizer_sha256,
        )
        self._payload_hash = hashlib.sha256()
        self._chunk_hash = hashlib.sha256()
        self._chunk_left = CHUNK_BYTES
        self._chunks: list[str] = []
        self._file = path.open("xb")
        self._file.write(b"\0" * HEADER_BYTES)

    def write(self, tokens: npt.NDArray[np.uint16], documents: int) -> None:
        """Append `tokens`, in which `documents` documents begin."""
        raw = np.ascontiguousarray(tokens, dtype="<u2").data.cast("B")
        self._file.write(raw)
        self._payload_hash.update(raw)
        self.tokens += len(tokens)
        self.documents += documents
        while raw:
            piece = raw[: self._chunk_left]
            self._chunk_hash.update(piece)
            self._chunk_left -= len(piece)
            raw = raw[len(piece) :]
            if self._chunk_left == 0:
                self._end_chunk()

    def _end_chunk(self) -> None:
        self._chunks.append(self._chunk_hash.hexdigest())
        self._chunk_hash = hashlib.sha256()
        self._chunk_left = CHUNK_BYTES

    def finish(self) -> dict[str, Any]:
        """Write the header, make the file durable, read it back; its fields for a `ShardEntry`."""
        if self._chunk_left < CHUNK_BYTES:
            self._end_chunk()
        header = replace(
            self._blank,
            tokens=self.tokens,
            documents=self.documents,
            payload_sha256=self._payload_hash.hexdigest(),
        )
        self._file.seek(0)
        self._file.write(header.to_bytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {
            "bytes": HEADER_BYTES + 2 * self.tokens,
            "tokens": self.tokens,
            "documents": self.documents,
            "sha256": file_sha256(self.path),
            "header_sha256": hashlib.sha256(header.to_bytes()).hexdigest(),
            "chunk_sha256": tuple(self._chunks),
        }

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
