"""`verify`: is every byte of a data set what its manifest says?"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from matilda_data.columns import unpack_columns
from matilda_data.dataset import ShardFile, check_entry
from matilda_data.errors import DataError
from matilda_data.manifest import Manifest, ShardEntry, read_manifest
from matilda_data.shard import file_sha256

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` looked at."""

    data_id: str
    shards: int
    tokens: int
    """Both splits, end-of-text included."""
    documents: int
    bytes_hashed: int
    seconds: float


def verify(data_dir: str | os.PathLike[str], deep: bool = False) -> VerifyReport:
    """Check the data set in `data_dir`: manifest, headers, lengths; all contents if `deep`.

    Raises:
        DataError: something is not what the manifest says; names the first such file.
    """
    began = time.monotonic()
    directory = Path(data_dir)
    manifest = read_manifest(directory)
    hashed = 0
    for entry in manifest.shards:
        check_entry(directory, entry)
        if deep:
            hashed += _verify_contents(directory, entry, manifest)
    return VerifyReport(
        data_id=manifest.data_id,
        shards=len(manifest.shards),
        tokens=sum(entry.tokens for entry in manifest.shards),
        documents=sum(entry.documents for entry in manifest.shards),
        bytes_hashed=hashed,
        seconds=time.monotonic() - began,
    )


def _verify_contents(directory: Path, entry: ShardEntry, manifest: Manifest) -> int:
    path = directory / entry.file
    shard = ShardFile(path, entry.tokens, entry.chunk_sha256)
    shard.verify()  # names the chunk
    if file_sha256(path) != entry.sha256:
        raise DataError(f"shard {str(path)!r} does not have the SHA-256 its manifest states")
    index_path = directory / entry.index_file
    raw = index_path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != entry.index_sha256:
        raise DataError(
            f"document index {str(index_path)!r} is damaged; restore it or prepare the data set "
            "again"
        )
    _, columns = unpack_columns(raw, str(index_path))
    starts = columns["starts"]
    begins = shard.tokens[starts]
    if len(starts) != entry.documents or (begins != manifest.tokenizer["eot_id"]).any():
        raise DataError(f"document index {str(index_path)!r} does not fit its shard")
    return entry.bytes + entry.index_bytes
