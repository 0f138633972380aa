"""Parts: what one unit of work becomes, written durably by whoever does the work.

`<key>.tokens` holds uint16 ids of its documents, each begun by end-of-text; `<key>.docs` is a
column file with lengths, text bytes, SHA-256 of the text, ids and origins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.columns import pack_columns, pack_strings, unpack_columns
from matilda_data.documents import ReadOptions, read_documents
from matilda_data.durable import durable_file, write_durably
from matilda_data.errors import DataError
from matilda_data.inputs import Unit
from matilda_data.tokenizer import load_tokenizer

__all__ = [
    "DamagedPartError",
    "Part",
    "PartRecord",
    "encode_unit",
    "read_documents_table",
    "read_tokens",
]

# Tokens are gathered to about this many before they are written.
FLUSH_TOKENS = 1 << 20


class DamagedPartError(Exception):
    """A part is missing or is not what the journal says: its unit must be done again."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What the journal says about a finished part."""

    unit: str
    tokens: int
    documents: int
    text_bytes: int
    empty: int
    """Empty documents that were dropped."""
    tokens_sha256: str
    docs_sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Part:
    """The document table of a part."""

    lengths: npt.NDArray[np.int64]
    """Tokens of each document, end-of-text included."""
    text_bytes: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint8]
    """uint8[documents, 32]: SHA-256 of each document's UTF-8 text."""
    columns: Mapping[str, npt.NDArray[Any]]
    """String columns `id` and `origin`, see `columns.string_at`."""


def encode_unit(
    unit: Unit, key: str, directory: Path, *, tokenizer: str, options: ReadOptions
) -> PartRecord:
    """Encode `unit` into durable part files in `directory`; a rerun writes the same bytes."""
    encoder = load_tokenizer(tokenizer)
    begin = np.array([encoder.eot_id], dtype=np.uint16)
    lengths: list[int] = []
    sizes: list[int] = []
    hashes: list[bytes] = []
    ids: list[str] = []
    origins: list[str] = []
    empty = total = waiting = 0
    buffer: list[npt.NDArray[np.uint16]] = []
    digest = hashlib.sha256()
    with durable_file(directory / f"{key}.tokens") as file:

        def flush() -> None:
            raw = np.concatenate(buffer).astype("<u2", copy=False).tobytes()
            digest.update(raw)
            file.write(raw)
            buffer.clear()

        for document in read_documents(unit, options):
            if not document.text:
                empty += 1
                continue
            raw = document.text.encode("utf-8")
            tokens = encoder.encode(document.text)
            buffer += (begin, tokens)
            lengths.append(len(tokens) + 1)
            sizes.append(len(raw))
            hashes.append(hashlib.sha256(raw).digest())
            ids.append(document.id)
            origins.append(document.origin)
            waiting += len(tokens) + 1
            total += len(tokens) + 1
            if waiting >= FLUSH_TOKENS:
                flush()
                waiting = 0
        if buffer:
            flush()
    table = pack_columns(
        {"unit": key, "documents": len(lengths)},
        {
            "lengths": np.array(lengths, dtype=np.int64),
            "text_bytes": np.array(sizes, dtype=np.int64),
            "hashes": np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 32),
            **pack_strings("id", ids),
            **pack_strings("origin", origins),
        },
    )
    write_durably(directory / f"{key}.docs", table)
    return PartRecord(
        unit=key,
        tokens=total,
        documents=len(lengths),
        text_bytes=sum(sizes),
        empty=empty,
        tokens_sha256=digest.hexdigest(),
        docs_sha256=hashlib.sha256(table).hexdigest(),
    )


def _read(path: Path, sha256: str, key: str) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError:
        raise DamagedPartError(key) from None
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise DamagedPartError(key)
    return raw


def read_documents_table(directory: Path, record: PartRecord) -> Part:
    """The verified document table of a part.

    Raises:
        DamagedPartError: missing or damaged.
    """
    raw = _read(directory / f"{record.unit}.docs", record.docs_sha256, record.unit)
    try:
        _, columns = unpack_columns(raw, record.unit)
        return Part(
            lengths=columns.pop("lengths"),
            text_bytes=columns.pop("text_bytes"),
            hashes=columns.pop("hashes"),
            columns=columns,
        )
    except (DataError, KeyError):
        raise DamagedPartError(record.unit) from None


def read_tokens(directory: Path, record: PartRecord) -> npt.NDArray[np.uint16]:
    """The verified tokens of a part, uint16[record.tokens].

    Raises:
        DamagedPartError: missing or damaged.
    """
    raw = _read(directory / f"{record.unit}.tokens", record.tokens_sha256, record.unit)
    return np.frombuffer(raw, dtype="<u2")
