"""Documents that share a run of words with an evaluation set are found, dropped and reported.

Words are runs of letters and digits in lower case; a document is contaminated when any 13 words in
a row are also in a row in one field of an evaluation item (the rule of GPT-3, Brown et al. 2020,
appendix C, without its exceptions).

Nearly every document is cleared by a rolling hash over its characters (`rolling.py`); the few that
are not are compared word by word.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.columns import pack_columns, unpack_columns
from matilda_data.durable import write_durably
from matilda_data.errors import DataError
from matilda_data.rolling import run_hashes

__all__ = [
    "NGRAM_WORDS",
    "EvaluationSet",
    "build_evaluation_set",
    "item_ids",
    "load_evaluation_set",
]

NGRAM_WORDS = 13
FILE_NAME = "evaluation.ngrams"
REPORT_NAME = "contamination.json"
FACTOR = np.uint64(0x9E3779B97F4A7C15)
CACHED_WORDS = 1 << 20
FILTER_LOAD = 64  # bits of the filter for each run: one run in 64 passes by chance

WORD = re.compile(r"[^\W_]+")

UInt64Array = npt.NDArray[np.uint64]


class _WordHashes(dict[str, int]):
    """64-bit hash of each word, remembered."""

    def __missing__(self, word: str) -> int:
        if len(self) >= CACHED_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = int.from_bytes(digest, "little")
        return self[word]


def _ngrams(text: str, words: _WordHashes) -> UInt64Array:
    """uint64 hash of each run of `NGRAM_WORDS` words."""
    hashes = np.array([words[word] for word in WORD.findall(text.lower())], dtype=np.uint64)
    n = len(hashes) - NGRAM_WORDS + 1
    if n < 1:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(n, dtype=np.uint64)
    for offset in range(NGRAM_WORDS):
        total = total * FACTOR + hashes[offset : offset + n]
    return total


@dataclass(frozen=True)
class EvaluationSet:
    """The word runs of evaluation items."""

    files: list[dict[str, Any]]
    """Per file: `name`, `sha256`, `items`."""
    sha256: str
    """Identity of all of it."""
    ngrams: UInt64Array
    """Sorted hashes, one for each item that has the run."""
    items: npt.NDArray[np.int64]
    """For each of `ngrams` the item, counted over all files."""
    rolling: UInt64Array
    """Sorted, distinct rolling hashes of the same n-grams."""

    @functools.cached_property
    def _filter(self) -> tuple[npt.NDArray[np.uint8], np.uint64]:
        """Bits and a shift: bit i is set if any rolling hash, shifted right, is i."""
        size = min(max(len(self.rolling) * FILTER_LOAD, 8).bit_length(), 29)
        shift = np.uint64(64 - size)
        seen = np.zeros(1 << size, dtype=np.bool_)
        seen[self.rolling >> shift] = True
        return np.packbits(seen, bitorder="little"), shift

    def _maybe(self, runs: UInt64Array) -> UInt64Array:
        """Those of `runs` that pass the filter; most runs then need no search."""
        table, shift = self._filter
        places = (runs >> shift).astype(np.uint32)
        bits = table[places >> np.uint32(3)] >> (places & np.uint32(7)).astype(np.uint8)
        passed: UInt64Array = runs[(bits & np.uint8(1)).astype(np.bool_)]
        return passed

    def matches(self, text: str, words: _WordHashes) -> npt.NDArray[np.int64]:
        """The items that `text` shares a run with, sorted."""
        runs = self._maybe(run_hashes(text, NGRAM_WORDS))
        if not len(runs) or not _among(runs, self.rolling).any():
            return np.empty(0, dtype=np.int64)
        runs = np.unique(_ngrams(text, words))
        first = np.searchsorted(self.ngrams, runs, side="left")
        stop = np.searchsorted(self.ngrams, runs, side="right")
        owners = [self.items[a:b] for a, b in zip(first, stop, strict=True) if b > a]
        return np.unique(np.concatenate([np.empty(0, np.int64), *owners]))


def _among(values: UInt64Array, known: UInt64Array) -> npt.NDArray[np.bool_]:
    """bool[n]: which `values` are in sorted, non-empty `known`."""
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    found: npt.NDArray[np.bool_] = known[places] == values
    return found


def new_word_hashes() -> _WordHashes:
    """An empty memory of word hashes for `EvaluationSet.matches`."""
    return _WordHashes()


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _items(path: Path) -> Iterator[object]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    raise DataError(f"line {number} of {str(path)!r} is not JSON") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"cannot read evaluation set {str(path)!r}: {error}") from None


def item_ids(path: Path) -> list[str]:
    """The `id` of each item of a file that `build_evaluation_set` reads; without one, its number
    from 0."""
    return [
        str(item["id"] if isinstance(item, dict) and "id" in item else number)
        for number, item in enumerate(_items(path))
    ]


def build_evaluation_set(paths: Sequence[str | os.PathLike[str]]) -> EvaluationSet:
    """Read evaluation items, one JSON object a line of `.jsonl` or `.jsonl.gz` files.

    Every string anywhere in an item counts. Empty lines are none.

    Raises:
        DataError: a file cannot be read.
    """
    words = _WordHashes()
    files: list[dict[str, Any]] = []
    hashes: list[UInt64Array] = []
    owners: list[npt.NDArray[np.int64]] = []
    rolling: list[UInt64Array] = []
    item = 0
    for path in map(Path, paths):
        before = item
        for value in _items(path):
            for text in _strings(value):
                if len(text) < 2 * NGRAM_WORDS - 1:
                    continue  # not so many words with something between them
                runs = _ngrams(text, words)
                hashes.append(runs)
                rolling.append(run_hashes(text, NGRAM_WORDS))
                owners.append(np.full(len(runs), item, dtype=np.int64))
            item += 1
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append({"name": path.name, "sha256": sha256, "items": item - before})
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    items = np.concatenate([np.empty(0, np.int64), *owners])
    identity = hashlib.sha256(json.dumps(files).encode() + np.unique(every).tobytes()).hexdigest()
    order = np.lexsort((items, every))
    ngrams, items = every[order], items[order]
    fresh = np.ones(len(order), dtype=np.bool_)
    fresh[1:] = (ngrams[1:] != ngrams[:-1]) | (items[1:] != items[:-1])
    distinct = np.unique(np.concatenate([np.empty(0, np.uint64), *rolling]))
    return EvaluationSet(files, identity, ngrams[fresh], items[fresh], distinct)


def store_evaluation_set(evaluation: EvaluationSet, directory: Path) -> None:
    """Put it where worker processes find it."""
    packed = pack_columns(
        {"files": evaluation.files, "sha256": evaluation.sha256},
        {
            "ngrams": evaluation.ngrams,
            "items": evaluation.items,
            "rolling": evaluation.rolling,
        },
    )
    write_durably(directory / FILE_NAME, packed)


@functools.lru_cache(maxsize=2)
def load_evaluation_set(directory: Path, sha256: str) -> EvaluationSet:
    """What `store_evaluation_set` put there.

    Raises:
        DataError: it is missing, damaged or another one.
    """
    path = directory / FILE_NAME
    try:
        meta, columns = unpack_columns(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}") from None
    if meta["sha256"] != sha256:
        raise DataError(f"{str(path)!r} is not the evaluation set of this preparation")
    return EvaluationSet(
        meta["files"], sha256, columns["ngrams"], columns["items"], columns["rolling"]
    )


def report(
    evaluation: EvaluationSet, found: Sequence[tuple[str, str, Sequence[int]]]
) -> dict[str, Any]:
    """What was found: `found` has (source, document id, items) for each dropped document."""
    ends = np.cumsum([file["items"] for file in evaluation.files])
    touched = sorted({item for _, _, items in found for item in items})

    def name(item: int) -> str:
        number = int(np.searchsorted(ends, item, side="right"))
        first = int(ends[number]) - evaluation.files[number]["items"]
        return f"{evaluation.files[number]['name']}:{item - first + 1}"

    counts = np.bincount(
        np.searchsorted(ends, touched, side="right"), minlength=len(evaluation.files)
    )
    return {
        "rule": f"{NGRAM_WORDS} words in a row, lower case, letters and digits",
        "files": [
            {**file, "items_found": int(count)}
            for file, count in zip(evaluation.files, counts, strict=True)
        ],
        "documents": [
            {"source": source, "id": document, "items": [name(item) for item in items]}
            for source, document, items in found
        ],
    }
