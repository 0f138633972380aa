"""Plain `.bin` shards to data sets with a manifest and an index, and back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from matilda_data.binfiles import open_bin
from matilda_data.columns import pack_columns, pack_strings
from matilda_data.dataset import TokenDataset, open_dataset
from matilda_data.durable import durable_file, write_durably
from matilda_data.errors import DataError
from matilda_data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    ShardEntry,
    SourceEntry,
    canonical_json,
    read_manifest,
    write_manifest,
)
from matilda_data.shard import ShardHeader, ShardWriter
from matilda_data.tokenizer import load_tokenizer

__all__ = ["export_bin", "import_bin"]

PathLike = str | os.PathLike[str]
COPY_TOKENS = 8 << 20


def import_bin(
    train: Sequence[PathLike],
    out_dir: PathLike,
    *,
    val: Sequence[PathLike] = (),
    tokenizer: str = "gpt2",
    name: str = "bin",
) -> Manifest:
    """Copy plain `.bin` shards into a data set with hashes, a manifest and a document index.

    Documents are what end-of-text tokens begin, and what a split's first shard has before any; they
    are called `<file>:<number>`. The held-out split is what `val` lists.

    Raises:
        DataError: `out_dir` holds a data set already or the shards themselves, or a shard cannot be
            used.
    """
    directory = Path(out_dir)
    if (directory / MANIFEST_NAME).exists():
        raise DataError(f"{str(directory)!r} already holds a data set; choose another directory")
    if any(Path(path).resolve().parent == directory.resolve() for path in (*train, *val)):
        raise DataError(f"{str(directory)!r} holds shards to convert; choose another directory")
    listed = {"train": list(train), "val": list(val)}
    opened = {
        split: open_bin(paths, tokenizer=tokenizer, split=split)
        for split, paths in listed.items()
        if paths
    }
    directory.mkdir(parents=True, exist_ok=True)
    entries = [
        entry
        for split in SPLITS
        if split in opened
        for entry in _copy_shards(opened[split], directory, name)
    ]
    source = SourceEntry(
        name=name,
        weight=1,
        origin={"kind": "bin", "files": {s: [Path(p).name for p in listed[s]] for s in SPLITS}},
        documents={s: sum(e.documents for e in entries if e.split == s) for s in SPLITS},
        tokens={s: sum(e.tokens for e in entries if e.split == s) for s in SPLITS},
        text_bytes=dict.fromkeys(SPLITS, 0),
    )
    content = [[entry.split, entry.sha256] for entry in entries]
    manifest = Manifest(
        tokenizer=load_tokenizer(tokenizer).identity(),
        sources=(source,),
        shards=tuple(entries),
        preparation={
            "pipeline": "import-bin/1",
            "inputs_sha256": hashlib.sha256(canonical_json(content)).hexdigest(),
        },
    )
    write_manifest(directory, manifest)
    return manifest


def _copy_shards(dataset: TokenDataset, directory: Path, name: str) -> list[ShardEntry]:
    entries = []
    for number, shard in enumerate(dataset.sources[0].shards):
        path = directory / f"{name}_{dataset.split}_{number:06d}.bin"
        path.unlink(missing_ok=True)
        writer = ShardWriter(
            path,
            number=number,
            vocab_size=dataset.vocab_size,
            eot_id=dataset.eot_id,
            tokenizer_sha256=dataset.tokenizer_sha256,
        )
        starts = []
        shard.verify()
        for first in range(0, shard.n_tokens, COPY_TOKENS):
            piece = shard.tokens[first : first + COPY_TOKENS]
            is_start = piece == dataset.eot_id
            is_start[0] |= number == first == 0
            begins = np.flatnonzero(is_start)
            starts.append(begins + first)
            writer.write(piece, len(begins))
        fields = writer.finish()
        where = np.concatenate(starts).astype(np.uint32)
        index = pack_columns(
            {"shard": path.name, "documents": len(where), "origins": [""]},
            {
                "starts": where,
                "text_bytes": np.zeros(len(where), dtype=np.uint32),
                "hashes": np.zeros((len(where), 32), dtype=np.uint8),
                "origin": np.zeros(len(where), dtype=np.uint32),
                **pack_strings("id", [f"{shard.path.name}:{i}" for i in range(len(where))]),
            },
        )
        index_path = path.with_suffix(".idx")
        write_durably(index_path, index)
        entries.append(
            ShardEntry(
                file=path.name,
                source=name,
                split=dataset.split,
                index_file=index_path.name,
                index_bytes=len(index),
                index_sha256=hashlib.sha256(index).hexdigest(),
                **fields,
            )
        )
    return entries


def export_bin(data_dir: PathLike, out_dir: PathLike) -> list[Path]:
    """Write both splits as plain shards whose header has nothing beyond what llm.c writes.

    Our shards can be read as they are by llm.c's and modded-nanogpt's loaders; this is for readers
    that insist on zeros after the third header word. Every chunk is verified on the way.

    Raises:
        DataError: not a data set, damaged, or `out_dir` holds a data set or shards of other names,
            which whoever reads `*.bin` there would take for its own.
    """
    target = Path(out_dir)
    if target.resolve() == Path(data_dir).resolve():
        raise DataError(f"{str(target)!r} holds the data set itself; choose another directory")
    manifest = read_manifest(Path(data_dir))
    _check_free(target, {entry.file for entry in manifest.shards})
    target.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for split in (split for split in SPLITS if manifest.total_tokens(split)):
        for source in open_dataset(data_dir, split).sources:
            for shard in source.shards:
                shard.verify()
                with durable_file(target / shard.path.name) as file:
                    file.write(ShardHeader(tokens=shard.n_tokens).plain_bytes())
                    file.write(shard.tokens.data.cast("B"))
                written.append(target / shard.path.name)
    return written


def _check_free(target: Path, names: Collection[str]) -> None:
    """Raise DataError unless shards of `names` can be written into `target`, perhaps again."""
    if (target / MANIFEST_NAME).exists():
        raise DataError(f"{str(target)!r} holds another data set; choose another directory")
    others = sorted(path.name for path in target.glob("*.bin") if path.name not in names)
    if others:
        raise DataError(
            f"{str(target)!r} holds other shards, such as {others[0]!r}; choose a new directory"
        )
