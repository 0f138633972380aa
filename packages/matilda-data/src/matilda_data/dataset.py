"""Opening a data set: `open_dataset`, `open_bin`. Nothing is handed out before it is verified.

At open: the manifest against its own hash, every shard's header against the manifest, every length.
At the first touch of a 64 MiB chunk: its SHA-256, unless a stamp says that the file was verified
before and has not been touched since.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.archive import ensure_expanded
from matilda_data.documents_index import DocumentIndex
from matilda_data.errors import DataError
from matilda_data.manifest import CHUNK_BYTES, SPLITS, Manifest, ShardEntry, read_manifest
from matilda_data.shard import HEADER_BYTES, read_header
from matilda_data.stamps import FileState, Stamps, file_state

__all__ = ["ShardFile", "TokenDataset", "TokenSource", "check_entry", "open_dataset"]

CHUNK_TOKENS = CHUNK_BYTES // 2

TokenArray = npt.NDArray[np.uint16]


class ShardFile:
    """One memory-mapped shard whose chunks are hashed before their first use."""

    def __init__(
        self,
        path: Path,
        n_tokens: int,
        *,
        sha256: str,
        chunk_sha256: Sequence[str],
        stamps: Stamps | None,
    ) -> None:
        self.path = path
        self.n_tokens = n_tokens
        self.sha256 = sha256
        self._chunk_sha256 = tuple(chunk_sha256)
        self._stamps = stamps
        stamped = stamps is not None and stamps.holds(path.name, sha256)
        self._verified = np.full(len(self._chunk_sha256), stamped, dtype=np.bool_)
        self._all_verified = stamped
        self._lock = threading.Lock()
        self._tokens: TokenArray | None = None
        self.verified_tokens: TokenArray | None = None  # `tokens`, once every chunk is verified
        self.state: FileState | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """For worker processes that are not forked: what is mapped or verified stays here."""
        again = functools.partial(
            ShardFile, sha256=self.sha256, chunk_sha256=self._chunk_sha256, stamps=self._stamps
        )
        return again, (self.path, self.n_tokens)

    @property
    def tokens(self) -> TokenArray:
        """Read-only uint16[n_tokens] map of the payload, not verified by itself."""
        if self._tokens is None:
            try:
                self.state = file_state(self.path)
                mapped = np.memmap(
                    self.path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(self.n_tokens,)
                )
            except (OSError, ValueError) as error:
                raise DataError(f"cannot map shard {str(self.path)!r}: {error}") from None
            self._tokens = mapped.view(np.ndarray)
            if self._all_verified and self._stamps is not None:
                # A stamp was believed at open, which may be days ago.
                still = self._stamps.holds(self.path.name, self.sha256)
                self._verified[:] = self._all_verified = still
        return self._tokens

    @property
    def verified(self) -> bool:
        """Whether every chunk has been verified, now or (by a stamp) before."""
        return self._all_verified

    def require(self, start: int, stop: int) -> None:
        """Verify the chunks that tokens `start` to `stop - 1` lie in.

        Raises:
            DataError: a chunk is not what the manifest says; names shard and chunk.
        """
        for chunk in range(start // CHUNK_TOKENS, (stop - 1) // CHUNK_TOKENS + 1):
            self._verify_chunk(chunk)

    def verify(self) -> int:
        """Verify every chunk not verified yet; the number of bytes hashed."""
        before = int(self._verified.sum())
        for chunk in range(len(self._chunk_sha256)):
            self._verify_chunk(chunk)
        return min((len(self._verified) - before) * CHUNK_BYTES, 2 * self.n_tokens)

    def check_untouched(self) -> None:
        """Verify again what was verified before, if anything has touched the file since.

        Raises:
            DataError: tokens that were handed out may not have been what the manifest says.
        """
        if self._tokens is None:
            return
        try:
            state = file_state(self.path)
        except OSError:  # removed: the map still holds what it held
            state = None
        if state != self.state:
            for chunk in range(len(self._chunk_sha256)):
                if self._verified[chunk]:
                    self._check_chunk(chunk)
            self.state = state

    def _check_chunk(self, chunk: int) -> None:
        piece = self.tokens[chunk * CHUNK_TOKENS : (chunk + 1) * CHUNK_TOKENS]
        if hashlib.sha256(piece.data.cast("B")).hexdigest() != self._chunk_sha256[chunk]:
            raise DataError(
                f"shard {str(self.path)!r} is damaged in chunk {chunk} (tokens "
                f"{chunk * CHUNK_TOKENS} to {chunk * CHUNK_TOKENS + len(piece) - 1}); restore "
                "it or prepare the data set again"
            )

    def _verify_chunk(self, chunk: int) -> None:
        if self._verified[chunk]:
            return
        with self._lock:
            if self._verified[chunk]:
                return
            self._check_chunk(chunk)
            self._verified[chunk] = True
            self._all_verified = bool(self._verified.all())
            if self._all_verified and self._stamps is not None and self.state is not None:
                self._stamps.add(self.path.name, self.sha256, self.state)


class TokenSource:
    """The shards of one source and split as one sequence of tokens."""

    def __init__(
        self,
        name: str,
        weight: int,
        shards: Sequence[ShardFile],
        index: DocumentIndex | None = None,
    ) -> None:
        self.name = name
        self.weight = weight
        self.shards = tuple(shards)
        self.index = index
        self._ends = list(itertools.accumulate(shard.n_tokens for shard in shards))
        self.n_tokens = self._ends[-1] if shards else 0

    def read(self, start: int, length: int) -> TokenArray:
        """uint16[length] tokens from `start` on, wrapping round at the end."""
        out = np.empty(length, dtype=np.uint16)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: TokenArray) -> None:
        """Fill `out` with the tokens from `start` on, wrapping round at the end.

        Raises:
            DataError: a shard proves damaged where it is read.
        """
        filled, wanted = 0, len(out)
        while filled < wanted:
            number = bisect.bisect_right(self._ends, start)
            shard = self.shards[number]
            local = start - (self._ends[number] - shard.n_tokens)
            stop = min(local + wanted - filled, shard.n_tokens)
            tokens = shard.tokens
            if not shard.verified:
                shard.require(local, stop)
            elif shard.verified_tokens is None:
                shard.verified_tokens = tokens
            taken = stop - local
            out[filled : filled + taken] = tokens[local:stop]
            filled += taken
            start = (start + taken) % self.n_tokens

    def read_row(self, start: int, out: TokenArray, row: int) -> None:
        """`read_into(start, out[row])`, in half the time where a row lies in one verified shard."""
        number = bisect.bisect_right(self._ends, start)
        shard = self.shards[number]
        local = start - self._ends[number] + shard.n_tokens
        stop = local + out.shape[1]
        if shard.verified_tokens is None or stop > shard.n_tokens:
            self.read_into(start, out[row])
        else:
            out[row] = shard.verified_tokens[local:stop]

    def locate(self, position: int) -> tuple[str, int]:
        """The shard file and the position in it of token `position`."""
        number = bisect.bisect_right(self._ends, position)
        shard = self.shards[number]
        return shard.path.name, position - (self._ends[number] - shard.n_tokens)


class TokenDataset:
    """One split of a data set, open for reading.

    Attributes:
        data_id: identity of the whole data set (both splits), hexadecimal SHA-256.
        split: `"train"` or `"val"`.
        tokenizer_name, tokenizer_sha256, vocab_size, eot_id: the tokenizer that made the tokens.
        n_tokens, n_documents: totals of this split, end-of-text included.
        sources: the parts of the mixture that have tokens in this split.
        manifest: everything else; None for plain `.bin` files.
        directory: where it lies.
    """

    def __init__(
        self,
        *,
        directory: Path,
        manifest: Manifest | None,
        data_id: str,
        split: str,
        tokenizer_name: str,
        tokenizer_sha256: str,
        vocab_size: int,
        eot_id: int,
        n_documents: int,
        sources: Sequence[TokenSource],
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.data_id = data_id
        self.split = split
        self.tokenizer_name = tokenizer_name
        self.tokenizer_sha256 = tokenizer_sha256
        self.vocab_size = vocab_size
        self.eot_id = eot_id
        self.n_documents = n_documents
        self.sources = tuple(sources)
        self.n_tokens = sum(source.n_tokens for source in self.sources)

    def verify_ahead(self) -> threading.Thread:
        """Verify all chunks in a daemon thread, so that first touches find them verified.

        Damage found there is not raised: the first touch of the chunk raises it. Hashing releases
        the interpreter lock (about 1.5 GB/s on one core).
        """

        def verify_all() -> None:
            for source in self.sources:
                for shard in source.shards:
                    try:
                        shard.verify()
                    except DataError:
                        continue

        thread = threading.Thread(target=verify_all, name="matilda-data-verify", daemon=True)
        thread.start()
        return thread

    def check_untouched(self) -> None:
        """Verify again every shard in use that anything has touched since it was verified.

        One `stat` a shard as long as nothing has. Call it before keeping what was made of tokens:
        damage that a file suffers between its verification and now does not get past it, unless
        the file system itself does not know (a rotten medium).

        Raises:
            DataError: a shard is no longer what the manifest says; names shard and chunk.
        """
        for source in self.sources:
            for shard in source.shards:
                shard.check_untouched()

    def __repr__(self) -> str:
        return (
            f"TokenDataset(data_id={self.data_id[:12]!r}, split={self.split!r}, "
            f"tokenizer={self.tokenizer_name!r}, n_tokens={self.n_tokens})"
        )


def open_dataset(
    data_dir: str | os.PathLike[str], split: str = "train", *, stamps: bool = True
) -> TokenDataset:
    """Open one split of the data set in `data_dir`.

    Every shard's header and length is checked here, in milliseconds; contents are checked chunk by
    chunk before their first token is handed out, once: a stamp remembers a verified shard as long
    as nothing touches the file (`stamps=False` neither trusts nor writes any).

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
    lasting = directory.absolute()  # files are read later, from whatever directory that is then
    known = Stamps(lasting, manifest.data_id) if stamps else None
    sources = []
    for source in manifest.sources:
        entries = [
            entry
            for entry in manifest.shards
            if entry.split == split and entry.source == source.name
        ]
        if entries:
            shards = [
                ShardFile(
                    lasting / entry.file,
                    entry.tokens,
                    sha256=entry.sha256,
                    chunk_sha256=entry.chunk_sha256,
                    stamps=known,
                )
                for entry in entries
            ]
            index = DocumentIndex(lasting, entries)
            sources.append(TokenSource(source.name, source.weight, shards, index))
    if not sources:
        other = "a larger" if split == "val" else "a smaller"
        raise DataError(
            f"data set {str(directory)!r} has no {split!r} documents; prepare it again with "
            f"{other} `--val-fraction` (in Python `val_fraction`) or more text"
        )
    return TokenDataset(
        directory=directory,
        manifest=manifest,
        data_id=manifest.data_id,
        split=split,
        tokenizer_name=str(manifest.tokenizer["name"]),
        tokenizer_sha256=str(manifest.tokenizer["sha256"]),
        vocab_size=int(manifest.tokenizer["vocab_size"]),
        eot_id=int(manifest.tokenizer["eot_id"]),
        n_documents=manifest.total_documents(split),
        sources=sources,
    )


def check_entry(directory: Path, entry: ShardEntry) -> None:
    """Compare a shard's header and length, and its index's length, with the manifest."""
    path = directory / entry.file
    ensure_expanded(path, entry)
    header = read_header(path)
    stated = (entry.header_sha256, entry.tokens, entry.documents)
    if (hashlib.sha256(header.to_bytes()).hexdigest(), header.tokens, header.documents) != stated:
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
