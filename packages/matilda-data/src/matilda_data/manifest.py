"""`manifest.json`: what a data set is, canonical to the byte, identified by one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from matilda_data.durable import write_durably
from matilda_data.errors import DataError

__all__ = [
    "CHUNK_BYTES",
    "FORMAT",
    "MANIFEST_NAME",
    "SPLITS",
    "Manifest",
    "ShardEntry",
    "SourceEntry",
    "canonical_json",
    "read_manifest",
    "write_manifest",
]

FORMAT = "matilda-data/1"
MANIFEST_NAME = "manifest.json"
CHUNK_BYTES = 64 << 20
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard file and its document index."""

    file: str
    """File name beside the manifest."""
    source: str
    """Name of the source its documents come from."""
    split: str
    """`"train"` or `"val"`."""
    bytes: int
    """File size, header included."""
    tokens: int
    """uint16 tokens after the header."""
    documents: int
    """Documents that begin in this shard."""
    sha256: str
    """SHA-256 of the whole file (what `sha256sum` prints)."""
    header_sha256: str
    """SHA-256 of the first 1,024 bytes."""
    chunk_sha256: tuple[str, ...]
    """SHA-256 of each `CHUNK_BYTES` of the payload (the bytes after the header)."""
    index_file: str
    """Sidecar with document starts and ids."""
    index_bytes: int
    """Size of the sidecar."""
    index_sha256: str
    """SHA-256 of the sidecar."""


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """One source of a data set, with its share of a training mixture."""

    name: str
    """Name, part of shard file names."""
    weight: int
    """Integer weight in the default mixture; 83 and 17 mean 83 and 17 samples of every 100."""
    origin: Mapping[str, Any]
    """Where the text came from: `kind`, and for the hub the dataset, config, revision and split."""
    documents: Mapping[str, int]
    """Documents per split."""
    tokens: Mapping[str, int]
    """Tokens per split, end-of-text included."""
    text_bytes: Mapping[str, int]
    """UTF-8 bytes of text per split."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete data set: its tokenizer's identity, its sources, every file with its hashes."""

    tokenizer: Mapping[str, Any]
    """`name`, `vocab_size`, `eot_id`, `sha256`, `pattern`."""
    sources: tuple[SourceEntry, ...]
    """Sources in the order given."""
    shards: tuple[ShardEntry, ...]
    """Shards in reading order: by source, split and number."""
    preparation: Mapping[str, Any]
    """What the bytes depend on: split rule, text policy, shard size, inputs' hash."""

    def to_json(self) -> dict[str, Any]:
        """The canonical content, `data_id` excluded."""
        return {
            "format": FORMAT,
            "complete": True,
            "tokenizer": dict(self.tokenizer),
            "sources": [asdict(source) for source in self.sources],
            "shards": [asdict(shard) for shard in self.shards],
            "preparation": dict(self.preparation),
        }

    @property
    def data_id(self) -> str:
        """SHA-256 of the canonical manifest: who has the same `data_id` has the same bytes."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def total_tokens(self, split: str) -> int:
        """Tokens of `split` over all sources, end-of-text included."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def total_documents(self, split: str) -> int:
        """Documents of `split` over all sources."""
        return sum(shard.documents for shard in self.shards if shard.split == split)


def canonical_json(value: object) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    ).encode("utf-8")


def render(content: Mapping[str, Any], data_id: str) -> bytes:
    """The bytes of `manifest.json`: readable, and the only rendering that is accepted back."""
    value = {**content, "data_id": data_id}
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode("utf-8")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Publish `manifest`: from here on the directory is a usable data set."""
    write_durably(directory / MANIFEST_NAME, render(manifest.to_json(), manifest.data_id))


def write_incomplete(directory: Path, command: str, preparation: Mapping[str, Any]) -> None:
    """Mark `directory` as a preparation under way, with the `command` that finishes it."""
    content = {"format": FORMAT, "complete": False, "command": command}
    content["preparation"] = dict(preparation)
    write_durably(directory / MANIFEST_NAME, canonical_json(content) + b"\n")


def read_incomplete(directory: Path) -> Mapping[str, Any] | None:
    """The mark of a preparation under way, or None when there is none or it cannot be read."""
    try:
        value = json.loads((directory / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    is_mark = isinstance(value, dict) and value.get("complete") is False
    return value if is_mark else None


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a complete data set, checked against its own `data_id`.

    Raises:
        DataError: missing, damaged, of another format, or the data set is incomplete.
    """
    path = directory / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"no `{MANIFEST_NAME}` in {str(directory)!r}; prepare a data set there first"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from None
    damaged = DataError(f"{str(path)!r} is damaged; restore it or prepare the data set again")
    try:
        value = json.loads(raw)
    except ValueError:
        raise damaged from None
    if not isinstance(value, dict):
        raise damaged
    if value.get("complete") is False:
        command = value.get("command")
        command = command or "the `prepare_text` call that began it"
        raise DataError(f"data set {str(directory)!r} is incomplete; finish it with: {command}")
    if value.get("format") != FORMAT:
        raise DataError(
            f"{str(path)!r} has format {value.get('format')!r}, this version reads {FORMAT!r}"
        )
    try:
        manifest = Manifest(
            tokenizer=value["tokenizer"],
            sources=tuple(SourceEntry(**source) for source in value["sources"]),
            shards=tuple(
                ShardEntry(**{**shard, "chunk_sha256": tuple(shard["chunk_sha256"])})
                for shard in value["shards"]
            ),
            preparation=value["preparation"],
        )
        # Re-rendering catches every flipped bit, also in white space and the data_id itself.
        if render(manifest.to_json(), manifest.data_id) != raw or not _well_formed(manifest):
            raise damaged
    except (KeyError, TypeError, ValueError, AttributeError):
        raise damaged from None
    return manifest


KINDS = {
    "str": str,
    "int": int,
    "tuple[str, ...]": tuple,
    "Mapping[str, Any]": dict,
    "Mapping[str, int]": dict,
}


def _well_formed(manifest: Manifest) -> bool:
    """Whether all values are of their kinds and all files lie beside the manifest: who edits it by
    hand can give it a fitting `data_id` too."""
    values: list[tuple[Any, type]] = [
        (getattr(item, field.name), KINDS[str(field.type)])
        for items in (manifest.sources, manifest.shards)
        for item in items
        for field in fields(item)
    ]
    values += [(manifest.tokenizer.get(name), str) for name in ("name", "sha256")]
    values += [(manifest.tokenizer.get(name), int) for name in ("vocab_size", "eot_id")]
    for source in manifest.sources:
        counts = (source.documents, source.tokens, source.text_bytes)
        values += [(count.get(split), int) for count in counts for split in SPLITS]
    names = [name for shard in manifest.shards for name in (shard.file, shard.index_file)]
    return (
        all(type(value) is kind for value, kind in values)
        and all(0 <= value < 2**62 for value, kind in values if kind is int)
        and all(Path(name).name == name for name in names)
        and all(len(s.chunk_sha256) == -(-2 * s.tokens // CHUNK_BYTES) for s in manifest.shards)
    )
