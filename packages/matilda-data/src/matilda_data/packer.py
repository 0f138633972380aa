"""Parts to shards, in unit order: the bytes depend on the parts alone."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.columns import pack_columns, pack_strings, string_at
from matilda_data.durable import write_durably
from matilda_data.manifest import SPLITS, ShardEntry, SourceEntry
from matilda_data.parts import Part, PartRecord, read_documents_table, read_tokens
from matilda_data.shard import ShardWriter
from matilda_data.tokenizer import Tokenizer

__all__ = ["PackOptions", "Packed", "Selection", "SourceParts", "pack", "select"]

# Parts are copied into shards about this many tokens at a time.
PIECE_TOKENS = 4 << 20


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What the packer decides."""

    shard_tokens: int
    val_threshold: int
    """A document is held out when the first 8 bytes of its SHA-256 (big-endian) are below this."""
    deduplicate: bool


@dataclass(frozen=True, kw_only=True)
class SourceParts:
    """The parts of one source, in unit order."""

    name: str
    weight: int
    origin: Mapping[str, Any]
    records: Sequence[PartRecord]
    train_tokens: int | None = None
    """Take documents in order until the train split has this many tokens; None takes all."""


class SplitWriter:
    """The shards of one source and split, cut at exactly `shard_tokens` tokens."""

    def __init__(
        self, directory: Path, source: str, split: str, tokenizer: Tokenizer, shard_tokens: int
    ) -> None:
        self.entries: list[ShardEntry] = []
        self.tokens = 0
        self.documents = 0
        self.text_bytes = 0
        self._directory = directory
        self._source, self._split = source, split
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._shard: ShardWriter | None = None
        self._starts: list[npt.NDArray[np.uint32]] = []
        self._sizes: list[npt.NDArray[np.uint32]] = []
        self._hashes: list[npt.NDArray[np.uint8]] = []
        self._ids: list[str] = []
        self._origins: list[str] = []

    def add(
        self, tokens: npt.NDArray[np.uint16], part: Part, chosen: npt.NDArray[np.int64]
    ) -> None:
        """Append the documents `chosen` of `part`, whose tokens lie end to end in `tokens`."""
        lengths = part.lengths[chosen]
        starts = np.cumsum(lengths) - lengths
        self.documents += len(chosen)
        self.text_bytes += int(part.text_bytes[chosen].sum())
        self.tokens += len(tokens)
        position = first = 0
        while position < len(tokens):
            if self._shard is None:
                self._open()
            shard = self._shard
            assert shard is not None
            stop = min(position + self._shard_tokens - shard.tokens, len(tokens))
            last = int(np.searchsorted(starts, stop))
            local = starts[first:last] - position + shard.tokens
            shard.write(tokens[position:stop], last - first)
            self._starts.append(local.astype(np.uint32))
            self._sizes.append(part.text_bytes[chosen[first:last]].astype(np.uint32))
            self._hashes.append(part.hashes[chosen[first:last]])
            for document in chosen[first:last].tolist():
                self._ids.append(string_at(part.columns, "id", document))
                self._origins.append(string_at(part.columns, "origin", document))
            position, first = stop, last
            if shard.tokens == self._shard_tokens:
                self.close()

    def _open(self) -> None:
        number = len(self.entries)
        self._shard = ShardWriter(
            self._directory / f"{self._source}_{self._split}_{number:06d}.bin",
            number=number,
            vocab_size=self._tokenizer.vocab_size,
            eot_id=self._tokenizer.eot_id,
            tokenizer_sha256=self._tokenizer.sha256,
        )

    def close(self) -> None:
        """Finish the shard under way, if any, and its index."""
        if self._shard is None:
            return
        shard = self._shard
        fields = shard.finish()
        index = self._index(shard.path.name)
        index_path = shard.path.with_suffix(".idx")
        write_durably(index_path, index)
        self.entries.append(
            ShardEntry(
                file=shard.path.name,
                source=self._source,
                split=self._split,
                index_file=index_path.name,
                index_bytes=len(index),
                index_sha256=hashlib.sha256(index).hexdigest(),
                **fields,
            )
        )
        self._shard = None
        for pending in (self._starts, self._sizes, self._hashes, self._ids, self._origins):
            pending.clear()

    def _index(self, name: str) -> bytes:
        names = sorted(set(self._origins))
        code = {origin: number for number, origin in enumerate(names)}
        return pack_columns(
            {"shard": name, "documents": len(self._ids), "origins": names},
            {
                "starts": np.concatenate(self._starts or [np.empty(0, np.uint32)]),
                "text_bytes": np.concatenate(self._sizes or [np.empty(0, np.uint32)]),
                "hashes": np.concatenate(self._hashes or [np.empty((0, 32), np.uint8)]),
                "origin": np.array([code[origin] for origin in self._origins], dtype=np.uint32),
                **pack_strings("id", self._ids),
            },
        )

    def abandon(self) -> None:
        """Remove the shard under way."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What the manifest says of packed sources."""

    sources: list[SourceEntry]
    shards: list[ShardEntry]
    dropped: dict[str, int]
    """Documents left out, by reason."""
    contaminated: list[tuple[str, str, list[int]]]
    """(source, document id, evaluation items) of documents dropped for them."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which documents of one source go where."""

    train: list[npt.NDArray[np.bool_]]
    """For each part, documents of the train split."""
    val: list[npt.NDArray[np.bool_]]
    """For each part, documents of the val split."""
    train_tokens: int
    satisfied: bool
    """Whether the train split reached the tokens asked for (True if none were)."""
    duplicates: int
    """Documents before the cut that equal an earlier one."""
    contaminated: list[tuple[str, str, list[int]]]
    """(source, document id, evaluation items) of what was dropped for them before the cut."""
    parts_used: int
    """Parts up to the cut."""


@dataclass(frozen=True)
class _SlimTable:
    """What selecting needs of a part's documents: about 24 bytes each."""

    lengths: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint8]
    """uint8[documents, 16]."""
    found: list[tuple[int, str, list[int]]]
    """(document, id, evaluation items) of those that share words with items."""


def _slim(table: Part) -> _SlimTable:
    found = [
        (
            document,
            string_at(table.columns, "id", document),
            table.hits[table.hits[:, 0] == document, 1].tolist(),
        )
        for document in np.unique(table.hits[:, 0]).tolist()
    ]
    return _SlimTable(table.lengths.copy(), table.hashes[:, :16].copy(), found)


def select(
    sources: Sequence[SourceParts], parts: Path, options: PackOptions
) -> Iterator[Selection]:
    """Decide, source after source, which documents to keep; reads document tables only.

    A document is kept if its text equals no document kept before it, until the train split has
    the tokens asked for. What follows the cut has no influence on anything.
    """
    seen = np.empty(0, dtype="V16")
    for source in sources:
        tables = [_slim(read_documents_table(parts, record)) for record in source.records]
        counts = [len(table.lengths) for table in tables]
        hashes = np.concatenate([np.empty((0, 16), np.uint8), *(table.hashes for table in tables)])
        lengths = np.concatenate([np.empty(0, np.int64), *(table.lengths for table in tables)])
        first = np.ones(len(hashes), dtype=np.bool_)
        rows = hashes.view("V16").reshape(-1)
        if options.deduplicate and len(rows):
            _, places = np.unique(np.concatenate([seen, rows]), return_index=True)
            first[:] = False
            first[places[places >= len(seen)] - len(seen)] = True
        clean = np.ones(len(rows), dtype=np.bool_)
        bases = np.cumsum([0, *counts])
        for table, base in zip(tables, bases.tolist(), strict=False):
            clean[[base + document for document, _, _ in table.found]] = False
        first &= clean
        leading = np.ascontiguousarray(hashes[:, :8]).view(">u8").reshape(-1)
        held_out = leading < np.uint64(options.val_threshold)
        train_ends = np.cumsum(np.where(first & ~held_out, lengths, 0))
        total = int(train_ends[-1]) if len(train_ends) else 0
        satisfied, end = True, len(rows)
        if source.train_tokens is not None:
            satisfied = total >= source.train_tokens
            if satisfied:
                end = int(np.searchsorted(train_ends, source.train_tokens)) + 1
        before_cut = np.arange(len(rows)) < end
        keep = first & before_cut
        seen = np.concatenate([seen, rows[keep]])
        bounds = list(itertools.pairwise(bases.tolist()))
        # Once, not for each part: a view keeps the whole array it is of.
        train, val = keep & ~held_out, keep & held_out
        yield Selection(
            train=[train[a:b] for a, b in bounds],
            val=[val[a:b] for a, b in bounds],
            train_tokens=int(lengths[train].sum()),
            satisfied=satisfied,
            duplicates=int((before_cut & ~first & clean).sum()),
            contaminated=[
                (source.name, name, items)
                for table, base in zip(tables, bases.tolist(), strict=False)
                for document, name, items in table.found
                if base + document < end
            ],
            parts_used=sum(1 for a, _ in bounds if a < end),
        )


def pack(
    sources: Sequence[SourceParts],
    parts: Path,
    directory: Path,
    tokenizer: Tokenizer,
    options: PackOptions,
) -> Packed:
    """Write shards and indexes into `directory` (empty).

    Raises:
        DamagedPartError: a part is not what the journal says; do its unit again, then call this.
    """
    entries: list[SourceEntry] = []
    shards: list[ShardEntry] = []
    duplicates = empty = 0
    contaminated: list[tuple[str, str, list[int]]] = []
    for source, selection in zip(sources, select(sources, parts, options), strict=True):
        duplicates += selection.duplicates
        contaminated += selection.contaminated
        empty += sum(record.empty for record in source.records[: selection.parts_used])
        writers = {
            split: SplitWriter(directory, source.name, split, tokenizer, options.shard_tokens)
            for split in SPLITS
        }
        try:
            for record, train, val in zip(
                source.records, selection.train, selection.val, strict=True
            ):
                if train.any() or val.any():
                    part = read_documents_table(parts, record)
                    tokens = read_tokens(parts, record)
                    _add_part(writers["train"], tokens, part, train)
                    _add_part(writers["val"], tokens, part, val)
            for writer in writers.values():
                writer.close()
        except BaseException:
            for writer in writers.values():
                writer.abandon()
            raise
        shards += [entry for split in SPLITS for entry in writers[split].entries]
        entries.append(
            SourceEntry(
                name=source.name,
                weight=source.weight,
                origin=source.origin,
                documents={split: writers[split].documents for split in SPLITS},
                tokens={split: writers[split].tokens for split in SPLITS},
                text_bytes={split: writers[split].text_bytes for split in SPLITS},
            )
        )
    dropped = {"duplicates": duplicates, "empty": empty, "contaminated": len(contaminated)}
    return Packed(sources=entries, shards=shards, dropped=dropped, contaminated=contaminated)


def _add_part(
    writer: SplitWriter,
    tokens: npt.NDArray[np.uint16],
    part: Part,
    wanted: npt.NDArray[np.bool_],
) -> None:
    """Add the `wanted` documents of a part, a bounded number of tokens at a time."""
    ends = np.cumsum(part.lengths)
    first = position = 0
    while first < len(wanted):
        last = max(int(np.searchsorted(ends, position + PIECE_TOKENS, side="right")), first + 1)
        chosen = np.flatnonzero(wanted[first:last]) + first
        stop = int(ends[last - 1])
        if len(chosen):
            mask = np.repeat(wanted[first:last], part.lengths[first:last])
            piece = tokens[position:stop]
            writer.add(piece if mask.all() else piece[mask], part, chosen)
        first, position = last, stop
