"""`verify`: is every byte of a data set what its manifest says?"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matilda_data.archive import is_archived
from matilda_data.contamination import REPORT_NAME
from matilda_data.dataset import ShardFile, check_entry
from matilda_data.documents_index import read_index
from matilda_data.errors import DataError
from matilda_data.manifest import Manifest, ShardEntry, read_manifest
from matilda_data.shard import file_sha256
from matilda_data.stamps import Stamps

__all__ = ["VerifyReport", "verify", "verify_unless_stamped"]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` looked at."""

    data_id: str
    shards: int
    tokens: int
    """Both splits, end-of-text included."""
    documents: int
    bytes_hashed: int
    """0 unless deep."""
    seconds: float


def verify(
    data_dir: str | os.PathLike[str],
    deep: bool = False,
    *,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyReport:
    """Check the data set in `data_dir`: manifest, headers, lengths; all contents if `deep`.

    A deep check trusts no stamp, and leaves stamps behind so that opening need not hash again.
    `on_shard` hears after each shard how many of how many are done.

    Raises:
        DataError: something is not what the manifest says; names the first such file.
    """
    began = time.monotonic()
    directory = Path(data_dir)
    manifest = read_manifest(directory)
    hashed = 0
    for done, entry in enumerate(manifest.shards, start=1):
        check_entry(directory, entry)
        if deep:
            hashed += _verify_contents(directory, entry, manifest)
        on_shard(done, len(manifest.shards))
    if deep:
        check_report(directory, manifest)
    return VerifyReport(
        data_id=manifest.data_id,
        shards=len(manifest.shards),
        tokens=sum(entry.tokens for entry in manifest.shards),
        documents=sum(entry.documents for entry in manifest.shards),
        bytes_hashed=hashed,
        seconds=time.monotonic() - began,
    )


def verify_unless_stamped(directory: Path, manifest: Manifest) -> None:
    """Verify all contents but those of shards that were verified before and not touched since.

    Archived shards are left alone: what expands them verifies them.

    Raises:
        DataError: something is not what the manifest says; names the first such file.
    """
    stamps = Stamps(directory, manifest.data_id)
    for entry in manifest.shards:
        if not is_archived(directory / entry.file):
            check_entry(directory, entry)
            if not stamps.holds(entry.file, entry.sha256):
                _verify_contents(directory, entry, manifest)
        read_index(directory, entry)
    check_report(directory, manifest)


def check_report(directory: Path, manifest: Manifest) -> None:
    """Raise DataError unless the report of a decontaminated data set is the one of its manifest."""
    stated = manifest.preparation.get("contamination_report_sha256")
    if stated is None:
        return
    path = directory / REPORT_NAME
    try:
        found = file_sha256(path)
    except OSError as error:
        raise DataError(
            f"cannot read {str(path)!r}: {error.strerror}; restore it or prepare the data set again"
        ) from None
    if found != stated:
        raise DataError(f"{str(path)!r} is damaged; restore it or prepare the data set again")


def _verify_contents(directory: Path, entry: ShardEntry, manifest: Manifest) -> int:
    path = directory / entry.file
    shard = ShardFile(
        path, entry.tokens, sha256=entry.sha256, chunk_sha256=entry.chunk_sha256, stamps=None
    )
    tokens = shard.tokens
    if file_sha256(path) != entry.sha256:
        shard.verify()  # names the chunk, unless the header is what differs
        raise DataError(f"shard {str(path)!r} does not have the SHA-256 its manifest states")
    _, columns = read_index(directory, entry)
    starts = columns["starts"]
    begins = tokens[starts[starts > 0]]  # imported shards may begin in mid-document
    if len(starts) != entry.documents or (begins != manifest.tokenizer["eot_id"]).any():
        raise DataError(
            f"document index {str(directory / entry.index_file)!r} does not fit its shard"
        )
    if shard.state is not None:
        Stamps(directory, manifest.data_id).add(entry.file, entry.sha256, shard.state)
    return entry.bytes + entry.index_bytes
