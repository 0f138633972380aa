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

__all__ = ["PackOptions", "SourceParts", "pack"]


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


def pack(
    sources: Sequence[SourceParts],
    parts: Path,
    directory: Path,
    tokenizer: Tokenizer,
    options: PackOptions,
) -> tuple[list[SourceEntry], list[ShardEntry], int]:
    """Write shards and indexes into `directory` (empty); returns what the manifest says of them.

    The last value is the number of documents dropped as copies of an earlier one.

    Raises:
        DamagedPartError: a part is not what the journal says; do its unit again, then call this.
    """
    kept, duplicates = _first_copies(sources, parts, options.deduplicate)
    entries: list[SourceEntry] = []
    shards: list[ShardEntry] = []
    for source in sources:
        writers = {
            split: SplitWriter(directory, source.name, split, tokenizer, options.shard_tokens)
            for split in SPLITS
        }
        try:
            for record in source.records:
                part = read_documents_table(parts, record)
                tokens = read_tokens(parts, record)
                keep = next(kept)
                held_out = _held_out(part, options.val_threshold)
                for split, wanted in (("train", keep & ~held_out), ("val", keep & held_out)):
                    if wanted.any():
                        chosen = np.flatnonzero(wanted)
                        mask = np.repeat(wanted, part.lengths)
                        picked = tokens if mask.all() else tokens[mask]
                        writers[split].add(picked, part, chosen)
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
    return entries, shards, duplicates


def _held_out(part: Part, threshold: int) -> npt.NDArray[np.bool_]:
    leading = np.ascontiguousarray(part.hashes[:, :8]).view(">u8").reshape(-1)
    return leading < np.uint64(threshold)


def _first_copies(
    sources: Sequence[SourceParts], parts: Path, deduplicate: bool
) -> tuple[Iterator[npt.NDArray[np.bool_]], int]:
    """For each part in order, which documents to keep; and how many are dropped in all."""
    hashes = [
        read_documents_table(parts, record).hashes[:, :16] if deduplicate else None
        for source in sources
        for record in source.records
    ]
    counts = [record.documents for source in sources for record in source.records]
    keep = np.ones(sum(counts), dtype=np.bool_)
    if deduplicate and len(keep):
        rows = np.ascontiguousarray(np.concatenate([item for item in hashes if item is not None]))
        _, first = np.unique(rows.view("V16").reshape(-1), return_index=True)
        keep[:] = False
        keep[first] = True
    bounds = np.cumsum([0, *counts])
    masks = (keep[a:b] for a, b in itertools.pairwise(bounds))
    return masks, int((~keep).sum())
