"""Parts: what one unit of work becomes, written durably by whoever does the work.

`<key>.tokens` holds uint16 ids of its documents, each begun by end-of-text; `<key>.docs` is a
column file with lengths, text bytes, SHA-256 of the text, ids and origins.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.columns import pack_columns, pack_strings, unpack_columns
from matilda_data.contamination import EvaluationSet, load_evaluation_set, new_word_hashes
from matilda_data.documents import Document, ReadOptions, read_documents
from matilda_data.durable import durable_file, write_durably
from matilda_data.errors import DataError
from matilda_data.fast import BatchEncoder
from matilda_data.inputs import Unit
from matilda_data.shard import file_sha256
from matilda_data.tokenizer import load_tokenizer

__all__ = [
    "DamagedPartError",
    "Part",
    "PartRecord",
    "encode_unit",
    "read_documents_table",
    "read_tokens",
]

# Documents are encoded in batches of about this many characters.
BATCH_CHARS = 2 << 20


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
    hits: npt.NDArray[np.int64]
    """int64[n, 2]: (document, evaluation item) pairs that share a run of words."""


def encode_unit(
    unit: Unit, key: str, directory: Path, *, tokenizer: str, backend: str, options: ReadOptions
) -> PartRecord:
    """Encode `unit` into durable part files in `directory`; a rerun writes the same bytes."""
    eot_id = load_tokenizer(tokenizer).eot_id
    encode = _encoder(tokenizer, backend)
    table = _TableBuilder()
    if options.evaluation_sha256:
        table.evaluation = load_evaluation_set(directory.parent, options.evaluation_sha256)
    empty = total = 0
    digest = hashlib.sha256()
    with durable_file(directory / f"{key}.tokens") as file:
        for batch in _batches(read_documents(unit, options)):
            full = [document for document in batch if document.text]
            empty += len(batch) - len(full)
            ids, lengths = encode([document.text for document in full])
            tokens = _begin_each(ids, lengths, eot_id)
            raw = tokens.astype("<u2", copy=False).data.cast("B")
            digest.update(raw)
            file.write(raw)
            total += len(tokens)
            table.add(full, lengths + 1)
    packed = table.pack(key)
    write_durably(directory / f"{key}.docs", packed)
    return PartRecord(
        unit=key,
        tokens=total,
        documents=len(table.ids),
        text_bytes=sum(table.sizes),
        empty=empty,
        tokens_sha256=digest.hexdigest(),
        docs_sha256=hashlib.sha256(packed).hexdigest(),
    )


@functools.cache
def _encoder(tokenizer: str, backend: str) -> BatchEncoder:
    return load_tokenizer(tokenizer).batch_encoder(backend)[0]


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _begin_each(
    ids: npt.NDArray[np.uint16], lengths: npt.NDArray[np.int64], eot_id: int
) -> npt.NDArray[np.uint16]:
    """`ids` with `eot_id` before each document."""
    tokens = np.empty(len(ids) + len(lengths), dtype=np.uint16)
    is_text = np.ones(len(tokens), dtype=np.bool_)
    is_text[np.cumsum(lengths + 1) - (lengths + 1)] = False
    tokens[is_text] = ids
    tokens[~is_text] = eot_id
    return tokens


class _TableBuilder:
    """Collects the document table of a part."""

    def __init__(self) -> None:
        self.lengths: list[npt.NDArray[np.int64]] = []
        self.sizes: list[int] = []
        self.hashes: list[bytes] = []
        self.ids: list[str] = []
        self.origins: list[str] = []
        self.evaluation: EvaluationSet | None = None
        self.hits: list[tuple[int, int]] = []
        self._words = new_word_hashes()

    def add(self, documents: list[Document], lengths: npt.NDArray[np.int64]) -> None:
        self.lengths.append(lengths)
        for document in documents:
            if self.evaluation is not None:
                for item in self.evaluation.matches(document.text, self._words).tolist():
                    self.hits.append((len(self.ids), item))
            raw = document.text.encode("utf-8")
            self.sizes.append(len(raw))
            self.hashes.append(hashlib.sha256(raw).digest())
            self.ids.append(document.id)
            self.origins.append(document.origin)

    def pack(self, key: str) -> bytes:
        return pack_columns(
            {"unit": key, "documents": len(self.ids)},
            {
                "lengths": np.concatenate([np.empty(0, np.int64), *self.lengths]),
                "text_bytes": np.array(self.sizes, dtype=np.int64),
                "hashes": np.frombuffer(b"".join(self.hashes), dtype=np.uint8).reshape(-1, 32),
                **pack_strings("id", self.ids),
                **pack_strings("origin", self.origins),
                "hits": np.array(self.hits, dtype=np.int64).reshape(-1, 2),
            },
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
            hits=columns.pop("hits"),
            columns=columns,
        )
    except (DataError, KeyError):
        raise DamagedPartError(record.unit) from None


def read_tokens(directory: Path, record: PartRecord) -> npt.NDArray[np.uint16]:
    """The verified tokens of a part as a read-only map, uint16[record.tokens].

    Raises:
        DamagedPartError: missing or damaged.
    """
    path = directory / f"{record.unit}.tokens"
    try:
        if file_sha256(path) != record.tokens_sha256:
            raise DamagedPartError(record.unit)
        if not record.tokens:
            return np.empty(0, dtype=np.uint16)
        return np.memmap(path, dtype="<u2", mode="r").view(np.ndarray)
    except OSError:
        raise DamagedPartError(record.unit) from None
