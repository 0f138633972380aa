"""Units of work to documents. The text policy is here and is recorded in the manifest.

UTF-8 is required (or, if asked for, undecodable bytes become U+FFFD); text is otherwise kept to the
byte: no normalization, no newline translation, NUL and byte-order marks kept, but for one before a
file's first line of JSON, which is not text. Empty documents are dropped and counted. One document
may be as large as memory allows.
"""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matilda_data.blobs import fetch_blobs
from matilda_data.errors import DataError
from matilda_data.inputs import InputFile, Unit, blocks, import_parquet
from matilda_data.persistence import Retry

__all__ = ["Document", "ReadOptions", "read_documents"]

logger = logging.getLogger("matilda_data")

ESCAPED_SURROGATES = (b"\\ud", b"\\uD")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How documents are taken from files; part of a data set's identity."""

    text_field: str = "text"
    """JSON key or parquet column of the text."""
    invalid_utf8: str = "error"
    """`"error"` refuses the input; `"replace"` puts U+FFFD for undecodable bytes."""
    evaluation_sha256: str = ""
    """Evaluation items to look for in documents (`contamination.py`); empty for none."""

    def __post_init__(self) -> None:
        if self.invalid_utf8 not in ("error", "replace"):
            raise DataError(f"`invalid_utf8` is {self.invalid_utf8!r}; choose 'error' or 'replace'")


@dataclass(frozen=True, slots=True)
class Document:
    """One document: `text` is valid UTF-8 when encoded; `origin` is the record's own `source`."""

    text: str
    id: str
    origin: str


def read_documents(unit: Unit, options: ReadOptions) -> Iterator[Document]:
    """The documents of `unit` in file order, empty ones included.

    Raises:
        DataError: the input changed since it was planned, or a record cannot be used; the message
            names the file and the line.
    """
    for file in unit.files:
        _check_unchanged(file)
    if unit.kind == "text":
        for file in unit.files:
            try:
                raw = Path(file.path).read_bytes()
            except OSError as error:
                raise DataError(f"cannot read input {file.path!r}: {error.strerror}") from None
            yield Document(_decode(raw, repr(file.path), options), file.name, "")
    elif unit.kind == "lines":
        yield from _read_lines(unit, options)
    else:
        yield from _read_parquet(unit, options)


def _check_unchanged(file: InputFile) -> None:
    try:
        stat = Path(file.path).stat()
    except OSError as error:
        raise DataError(f"cannot read input {file.path!r}: {error.strerror}") from None
    # A time of 0 stands for content that is pinned by its hash.
    if stat.st_size != file.size or file.mtime_ns not in (0, stat.st_mtime_ns):
        raise DataError(f"input {file.path!r} changed while it was being prepared; start again")


def _decode(raw: bytes, where: str, options: ReadOptions) -> str:
    try:
        return raw.decode("utf-8", errors="strict")
    except UnicodeDecodeError as error:
        if options.invalid_utf8 == "replace":
            return raw.decode("utf-8", errors="replace")
        raise DataError(
            f"{where} is not UTF-8 at byte {error.start}; convert or exclude it, or set "
            "`invalid_utf8` to 'replace'"
        ) from None


def _clean(text: str, where: str, options: ReadOptions) -> str:
    """JSON can spell lone surrogates, which no UTF-8 has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if options.invalid_utf8 == "replace":
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        raise DataError(
            f"{where} has a lone surrogate at character {error.start}; repair or exclude it, or "
            "set `invalid_utf8` to 'replace'"
        ) from None
    return text


def _read_lines(unit: Unit, options: ReadOptions) -> Iterator[Document]:
    file = unit.files[0]
    number = unit.first_line - 1
    for line in _lines_between(file, unit.start, unit.stop):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # some editors begin a file with a mark
        if not line.strip():
            continue
        where = f"line {number} of {file.path!r}"
        try:
            record = json.loads(_decode(line, where, options))
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            deep = isinstance(error, RecursionError)
            reason = "too deeply nested" if deep else getattr(error, "msg", str(error))
            raise DataError(f"{where} is not JSON ({reason}); repair or remove it") from None
        if not isinstance(record, dict) or not isinstance(record.get(options.text_field), str):
            raise DataError(
                f"{where} has no string `{options.text_field}`; each line must be an object with it"
            )
        text = record[options.text_field]
        if any(escape in line for escape in ESCAPED_SURROGATES):
            text = _clean(text, where, options)
        name = _label(record.get("id"), f"{file.name}:{number}")
        yield Document(text, name, _label(record.get("source"), ""))


def _label(value: object, default: str) -> str:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value).encode("utf-8", "replace").decode("utf-8")
    return default


def _lines_between(file: InputFile, start: int, stop: int) -> Iterator[bytes]:
    """Lines of the uncompressed bytes [start, stop); both are at line starts or the end."""
    left = stop - start
    pending: list[bytes] = []  # a line may be many blocks long
    for block in blocks(file, start):
        first, *more = block[:left].split(b"\n")
        pending.append(first)
        if more:
            yield b"".join(pending)
            yield from more[:-1]
            pending = more[-1:]
        left -= len(block)
        if left <= 0:
            break
    if last := b"".join(pending):
        yield last


def _read_parquet(unit: Unit, options: ReadOptions) -> Iterator[Document]:
    file, parquet = unit.files[0], import_parquet()
    number, absent = unit.first_line - 1, 0
    text_field = "blob_id" if unit.blob_url else unit.text_field or options.text_field
    try:
        with parquet.ParquetFile(file.path) as opened:
            names = set(opened.schema_arrow.names)
            if text_field not in names:
                raise DataError(
                    f"{file.path!r} has no column `{text_field}`; it has {', '.join(sorted(names))}"
                )
            columns = [text_field, *sorted(names & {"id", "source", "repo_name"})]
            groups = range(unit.start, unit.stop)
            for batch in opened.iter_batches(256, row_groups=list(groups), columns=columns):
                records = batch.to_pylist()
                texts = [record[text_field] for record in records]
                for row, text in enumerate(texts, start=number + 1):
                    if not isinstance(text, str):
                        raise DataError(f"row {row} of {file.path!r} has no string `{text_field}`")
                if unit.blob_url:
                    ids, texts = texts, fetch_blobs(unit.blob_url, texts, Retry())
                    absent += texts.count("")
                else:
                    ids = [record.get("id") for record in records]
                for record, text, each in zip(records, texts, ids, strict=True):
                    number += 1
                    name = _label(each, f"{file.name}:{number}")
                    origin = record.get("source") or record.get("repo_name")
                    yield Document(text, name, _label(origin, ""))
        if absent:
            logger.warning(
                "%d rows of %s have no text at %s; they count as empty documents",
                *(absent, file.name, unit.blob_url),
            )
    except DataError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot read {file.path!r} as parquet: {reason}") from None
