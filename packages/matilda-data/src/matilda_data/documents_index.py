"""Which document a token belongs to, from the sidecar indexes; read on first use, verified."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.columns import string_at, unpack_columns
from matilda_data.errors import DataError
from matilda_data.manifest import ShardEntry

__all__ = ["DocumentEntry", "DocumentIndex", "read_index"]


# Indexes of shards kept: a document ends where the next begins, which may be another shard.
KEPT_INDEXES = 3


@dataclass(frozen=True, kw_only=True)
class DocumentEntry:
    """One document of a source."""

    number: int
    """Its place among the source's documents of this split."""
    id: str
    origin: str
    """The record's own `source` field, empty if it had none."""
    sha256: str
    """SHA-256 of its UTF-8 text."""
    text_bytes: int
    start: int
    """Position of its end-of-text token among the source's tokens."""
    stop: int
    """Position after its last token."""


def read_index(directory: Path, entry: ShardEntry) -> tuple[dict[str, Any], dict[str, Any]]:
    """Meta data and columns of one sidecar, its SHA-256 checked.

    Raises:
        DataError: missing or damaged; names the file.
    """
    path = directory / entry.index_file
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read document index {str(path)!r}: {error.strerror}") from None
    if hashlib.sha256(raw).hexdigest() != entry.index_sha256:
        raise DataError(
            f"document index {str(path)!r} is damaged; restore it or prepare the data set again"
        )
    return unpack_columns(raw, str(path))


class DocumentIndex:
    """The documents of one source and split; nothing is read before it is asked."""

    def __init__(self, directory: Path, entries: Sequence[ShardEntry]) -> None:
        self._directory = directory
        self._entries = tuple(entries)
        ends = np.cumsum([0, *(entry.tokens for entry in entries)], dtype=np.int64)
        self._token_bases, self._n_tokens = ends[:-1], int(ends[-1])
        counts = np.cumsum([0, *(entry.documents for entry in entries)], dtype=np.int64)
        self._document_bases, self.n_documents = counts[:-1], int(counts[-1])
        self._starts: npt.NDArray[np.int64] | None = None

        @functools.lru_cache(maxsize=KEPT_INDEXES)
        def read(shard: int) -> tuple[dict[str, Any], dict[str, Any]]:
            return read_index(directory, self._entries[shard])

        self._read = read

    def __reduce__(self) -> tuple[Any, ...]:
        return DocumentIndex, (self._directory, self._entries)

    def starts(self) -> npt.NDArray[np.int64]:
        """int64[n_documents] positions of the end-of-text tokens that begin documents.

        Reads every index; the other methods read those of the shards in question.
        """
        if self._starts is None:
            pieces = [
                read_index(self._directory, entry)[1]["starts"].astype(np.int64) + base
                for entry, base in zip(self._entries, self._token_bases, strict=True)
            ]
            self._starts = np.concatenate(pieces)
        return self._starts

    def document_at(self, position: int) -> int:
        """Number of the document that token `position` belongs to."""
        shard = int(np.searchsorted(self._token_bases, position, side="right")) - 1
        local = np.uint32(position - int(self._token_bases[shard]))
        begun = np.searchsorted(self._read(shard)[1]["starts"], local, side="right")
        return int(self._document_bases[shard]) + int(begun) - 1

    def entry(self, number: int) -> DocumentEntry:
        """The document called `number`."""
        shard, local = self._place(number)
        meta, columns = self._read(shard)
        last = number + 1 == self.n_documents
        return DocumentEntry(
            number=number,
            id=string_at(columns, "id", local),
            origin=str(meta["origins"][int(columns["origin"][local])]),
            sha256=columns["hashes"][local].tobytes().hex(),
            text_bytes=int(columns["text_bytes"][local]),
            start=self._start(number),
            stop=self._n_tokens if last else self._start(number + 1),
        )

    def _place(self, number: int) -> tuple[int, int]:
        """The shard that document `number` begins in, and its place among those that do."""
        # Of shards with the same base only the last has documents.
        shard = int(np.searchsorted(self._document_bases, number, side="right")) - 1
        return shard, number - int(self._document_bases[shard])

    def _start(self, number: int) -> int:
        shard, local = self._place(number)
        return int(self._token_bases[shard]) + int(self._read(shard)[1]["starts"][local])
