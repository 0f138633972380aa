"""Opening a data set: `open_dataset`. Nothing is handed out before it has been verified.

At open: the manifest against its own hash, every shard's header against the manifest, every length.
At the first touch of a 64 MiB chunk: its SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from matilda_data.errors import DataError
from matilda_data.manifest import CHUNK_BYTES, SPLITS, Manifest, ShardEntry, read_manifest
from matilda_data.shard import HEADER_BYTES, read_header

__all__ = ["ShardFile", "TokenDataset", "TokenSource", "open_dataset"]

CHUNK_TOKENS = CHUNK_BYTES // 2

TokenArray = npt.NDArray[np.uint16]


class ShardFile:
    """One memory-mapped shard whose chunks are hashed before their first use."""

    def __init__(self, path: Path, n_tokens: int, chunk_sha256: Sequence[str]) -> None:
        self.path = path
        self.n_tokens = n_tokens
        self._chunk_sha256 = tuple(chunk_sha256)
        self._verified = np.zeros(len(self._chunk_sha256), dtype=np.bool_)
        self._all_verified = False
        self._lock = threading.Lock()
        self._tokens: TokenArray | None = None

    @property
    def tokens(self) -> TokenArray:
        """Read-only uint16[n_tokens] map of the payload, not verified by itself."""
        if self._tokens is None:
            try:
                mapped = np.memmap(
                    self.path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(self.n_tokens,)
                )
            except (OSError, ValueError) as error:
                raise DataError(f"cannot map shard {str(self.path)!r}: {error}") from None
            self._tokens = mapped.view(np.ndarray)
        return self._tokens

    def require(self, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> None:
        """Verify the chunks that token positions `first` to `last` (inclusive, arrays) touch.

        Raises:
            DataError: a chunk is not what the manifest says; names shard and chunk.
        """
        if self._all_verified:
            return
        for chunk in np.unique(np.concatenate([first, last]) // CHUNK_TOKENS).tolist():
            self._verify_chunk(chunk)

    def verify(self) -> int:
        """Verify every chunk not verified yet; the number of bytes hashed."""
        before = int(self._verified.sum())
        for chunk in range(len(self._chunk_sha256)):
            self._verify_chunk(chunk)
        return min((len(self._verified) - before) * CHUNK_BYTES, 2 * self.n_tokens)

    def _verify_chunk(self, chunk: int) -> None:
        if self._verified[chunk]:
            return
        with self._lock:
            piece = self.tokens[chunk * CHUNK_TOKENS : (chunk + 1) * CHUNK_TOKENS]
            if hashlib.sha256(piece.data.cast("B")).hexdigest() != self._chunk_sha256[chunk]:
                raise DataError(
                    f"shard {str(self.path)!r} is damaged in chunk {chunk} (tokens "
                    f"{chunk * CHUNK_TOKENS} to {chunk * CHUNK_TOKENS + len(piece) - 1}); restore "
                    "it or prepare the data set again"
                )
            self._verified[chunk] = True
            self._all_verified = bool(self._verified.all())


class TokenSource:
    """The shards of one source and split as one sequence of tokens."""

    def __init__(self, name: str, weight: int, shards: Sequence[ShardFile]) -> None:
        self.name = name
        self.weight = weight
        self.shards = tuple(shards)
        self._ends = np.cumsum([shard.n_tokens for shard in shards], dtype=np.int64)
        self.n_tokens = int(self._ends[-1]) if len(shards) else 0

    def gather(self, starts: npt.NDArray[np.int64], length: int) -> TokenArray:
        """uint16[len(starts), length]: `length` tokens from each start, wrapping at the end."""
        out = np.empty((len(starts), length), dtype=np.uint16)
        which = np.searchsorted(self._ends, starts, side="right")
        whole = starts + length <= self._ends[which]
        for number in np.unique(which[whole]).tolist():
            rows = np.flatnonzero(whole & (which == number))
            shard = self.shards[number]
            local = starts[rows] - (self._ends[number] - shard.n_tokens)
            shard.require(local, local + length - 1)
            tokens = shard.tokens
            for row, start in zip(rows.tolist(), local.tolist(), strict=True):
                out[row] = tokens[start : start + length]
        for row in np.flatnonzero(~whole).tolist():
            self._read_across(int(starts[row]), out[row])
        return out

    def _read_across(self, start: int, out: TokenArray) -> None:
        filled = 0
        while filled < len(out):
            number = int(np.searchsorted(self._ends, start, side="right"))
            shard = self.shards[number]
            local = start - int(self._ends[number] - shard.n_tokens)
            take = min(shard.n_tokens - local, len(out) - filled)
            positions = np.arange(local, local + take, max(CHUNK_TOKENS, 1), dtype=np.int64)
            shard.require(positions, np.array([local + take - 1], dtype=np.int64))
            out[filled : filled + take] = shard.tokens[local : local + take]
            filled += take
            start = (start + take) % self.n_tokens


class TokenDataset:
    """One split of a data set, open for reading.

    Attributes:
        data_id: identity of the whole data set (both splits), hexadecimal SHA-256.
        split: `"train"` or `"val"`.
        tokenizer_name, tokenizer_sha256, vocab_size, eot_id: the tokenizer that made the tokens.
        n_tokens, n_documents: totals of this split, end-of-text included.
        sources: the parts of the mixture that have tokens in this split.
        manifest: everything else.
    """

    def __init__(self, directory: Path, manifest: Manifest, split: str) -> None:
        self.directory = directory
        self.manifest = manifest
        self.data_id = manifest.data_id
        self.split = split
        self.tokenizer_name = str(manifest.tokenizer["name"])
        self.tokenizer_sha256 = str(manifest.tokenizer["sha256"])
        self.vocab_size = int(manifest.tokenizer["vocab_size"])
        self.eot_id = int(manifest.tokenizer["eot_id"])
        self.n_tokens = manifest.total_tokens(split)
        self.n_documents = manifest.total_documents(split)
        sources = []
        for source in manifest.sources:
            shards = [
                ShardFile(directory / entry.file, entry.tokens, entry.chunk_sha256)
                for entry in manifest.shards
                if entry.split == split and entry.source == source.name
            ]
            if shards:
                sources.append(TokenSource(source.name, source.weight, shards))
        self.sources = tuple(sources)

    def __repr__(self) -> str:
        return (
            f"TokenDataset(data_id={self.data_id[:12]!r}, split={self.split!r}, "
            f"tokenizer={self.tokenizer_name!r}, n_tokens={self.n_tokens})"
        )


def open_dataset(data_dir: str | os.PathLike[str], split: str = "train") -> TokenDataset:
    """Open one split of the data set in `data_dir`.

    Every shard's header and length is checked here, in milliseconds; contents are checked chunk by
    chunk before their first token is handed out.

    Raises:
        DataError: not a data set, incomplete (with the command that finishes it), a shard missing,
            truncated or with a damaged header (with its name), or no such split.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; choose 'train' or 'val'")
    directory = Path(data_dir)
    manifest = read_manifest(directory)
    for entry in manifest.shards:
        check_entry(directory, entry)
    dataset = TokenDataset(directory, manifest, split)
    if not dataset.n_tokens:
        other = "a larger" if split == "val" else "a smaller"
        raise DataError(
            f"data set {str(directory)!r} has no {split!r} documents; prepare it again with "
            f"{other} `val_fraction` or more text"
        )
    return dataset


def check_entry(directory: Path, entry: ShardEntry) -> None:
    """Compare a shard's header and length, and its index's length, with the manifest."""
    path = directory / entry.file
    header = read_header(path)
    if hashlib.sha256(header.to_bytes()).hexdigest() != entry.header_sha256:
        raise DataError(
            f"shard {str(path)!r} is not the one its manifest describes; restore it or prepare the "
            "data set again"
        )
    index = directory / entry.index_file
    try:
        size = index.stat().st_size
    except OSError:
        size = -1
    if size != entry.index_bytes:
        state = "missing" if size < 0 else "truncated or too long"
        raise DataError(
            f"document index {str(index)!r} is {state}; restore it or prepare the data set again"
        )
