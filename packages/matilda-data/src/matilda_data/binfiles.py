"""Plain llm.c / modded-nanogpt `.bin` shards, without a manifest of ours."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from matilda_data.dataset import ShardFile, TokenDataset, TokenSource
from matilda_data.errors import DataError
from matilda_data.manifest import CHUNK_BYTES, canonical_json
from matilda_data.shard import HEADER_BYTES, read_header
from matilda_data.tokenizer import load_tokenizer

__all__ = ["chunk_hashes", "open_bin"]


def open_bin(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    tokenizer: str = "gpt2",
    split: str = "train",
) -> TokenDataset:
    """Open plain `.bin` shards, in the order given, as a data set of one source called `bin`.

    Every byte is hashed here (about 1.5 GB/s), since nothing else vouches for it: the `data_id` is
    made of those hashes, so a stream resumed on changed files is refused. Files written by this
    package must still have the payload hash and tokenizer their headers state.

    Raises:
        DataError: no files, a file that is not such a shard, truncated, or of another tokenizer.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not listed:
        raise DataError("no `.bin` files given; list at least one")
    encoder = load_tokenizer(tokenizer)
    shards, identity = [], []
    for path in map(Path, listed):
        header = read_header(path)
        if header.tokenizer_sha256 not in (None, encoder.sha256):
            raise DataError(f"shard {str(path)!r} was not made with tokenizer {tokenizer!r}")
        payload, chunks, largest = chunk_hashes(path, header.tokens)
        if header.payload_sha256 not in (None, payload):
            raise DataError(f"shard {str(path)!r} is damaged; restore it or prepare it again")
        if largest >= encoder.vocab_size:
            raise DataError(
                f"shard {str(path)!r} has token id {largest}, outside tokenizer {tokenizer!r}"
            )
        shards.append(
            ShardFile(
                path.absolute(), header.tokens, sha256=payload, chunk_sha256=chunks, stamps=None
            )
        )
        identity.append([header.tokens, payload])
    content = ["plain bin", encoder.sha256, split, identity]
    return TokenDataset(
        directory=Path(listed[0]).parent,
        manifest=None,
        data_id=hashlib.sha256(canonical_json(content)).hexdigest(),
        split=split,
        tokenizer_name=encoder.name,
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        eot_id=encoder.eot_id,
        n_documents=0,
        sources=[TokenSource("bin", 1, [shard for shard in shards if shard.n_tokens])],
    )


def chunk_hashes(path: Path, n_tokens: int) -> tuple[str, list[str], int]:
    """SHA-256 of a shard's payload and of each of its chunks, and its largest token id."""
    payload, chunks, largest = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        left = 2 * n_tokens
        while left:
            raw = file.read(min(CHUNK_BYTES, left))
            if not raw:
                raise DataError(f"shard {str(path)!r} was cut while it was read")
            payload.update(raw)
            chunks.append(hashlib.sha256(raw).hexdigest())
            largest = max(largest, int(np.frombuffer(raw, dtype="<u2").max()))
            left -= len(raw)
    return payload.hexdigest(), chunks, largest
