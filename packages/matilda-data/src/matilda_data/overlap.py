"""How much of evaluation sets is in training text: the items that share a run of 13 words with it.

The text is that of a prepared data set, decoded from its tokens document by document, or of the
files one would be prepared from. The rule is that of `contamination.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matilda_data.contamination import (
    build_evaluation_set,
    item_ids,
    new_word_hashes,
    report,
)
from matilda_data.dataset import TokenSource, open_dataset
from matilda_data.documents import Document, ReadOptions, read_documents
from matilda_data.errors import DataError
from matilda_data.inputs import check_lists, find_files, plan_units
from matilda_data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["measure_overlap"]

FORMAT = "matilda-overlap/1"
DOCUMENTS_BETWEEN = 64

PathLike = str | os.PathLike[str]


def measure_overlap(
    evaluations: Sequence[PathLike],
    *,
    data_dir: PathLike | None = None,
    inputs: Sequence[PathLike] = (),
    split: str = "train",
    progress: Callable[[float, int], None] = lambda share, documents: None,
) -> dict[str, Any]:
    """What of `evaluations` (`.jsonl`, `.jsonl.gz`) is in a data set, or in `inputs`.

    Of the result, plain JSON, `files` has a row for each evaluation file: `name`, `sha256`,
    `items`, `items_found`, `ids` of the items found (their `id` field, else their number from 0),
    and `items_too_short`, those without a run that could be found; `documents` names the documents
    with what they share. `progress` is called with the share done and the number of documents.

    Raises:
        DataError: an evaluation file, the data set or an input cannot be read.
    """
    check_lists(evaluations=evaluations, inputs=inputs)  # `/`, a letter of most, is a path too
    if (data_dir is None) == (not inputs):
        raise DataError("give either a data set or input files to look through")
    evaluation = build_evaluation_set(evaluations)
    if data_dir is not None:
        dataset = open_dataset(data_dir, split=split)
        tokenizer = load_tokenizer(dataset.tokenizer_name)
        looked_at: dict[str, Any] = {"data_id": dataset.data_id, "split": split}
        total = dataset.n_tokens
        documents = (
            (source.name, document, size)
            for source in dataset.sources
            for document, size in _documents(source, tokenizer)
        )
    else:
        units = plan_units(find_files(inputs, exclude=(), include=None))
        looked_at = {"inputs": sorted({file.name for unit in units for file in unit.files})}
        total = sum(unit.input_bytes for unit in units)
        options = ReadOptions(invalid_utf8="replace")
        documents = (
            ("", document, len(document.text.encode("utf-8", "surrogatepass")))
            for unit in units
            for document in read_documents(unit, options)
        )
    words, number, done = new_word_hashes(), 0, 0
    found: list[tuple[str, str, list[int]]] = []
    for source, document, size in documents:
        items = evaluation.matches(document.text, words).tolist()
        if items:
            found.append((source, document.id, items))
        number, done = number + 1, done + size
        if number % DOCUMENTS_BETWEEN == 0:
            progress(min(done / max(total, 1), 1.0), number)
    progress(1.0, number)
    told = report(evaluation, found)
    touched, first = {item for _, _, items in found for item in items}, 0
    long_enough = set(evaluation.items.tolist())
    for file, path in zip(told["files"], map(Path, evaluations), strict=True):
        ids = enumerate(item_ids(path), start=first)
        file["ids"] = [name for item, name in ids if item in touched]
        file["items_too_short"] = sum(
            item not in long_enough for item in range(first, first + file["items"])
        )
        first += file["items"]
    return {"format": FORMAT, "searched": {**looked_at, "documents": number}, **told}


def _documents(source: TokenSource, tokenizer: Tokenizer) -> Iterator[tuple[Document, int]]:
    """Each document and its number of tokens, the end-of-text that begins it included."""
    if source.index is None:
        raise DataError(
            f"source {source.name!r} has no document index; import its shards with: "
            "matilda-data convert"
        )
    for number in range(source.index.n_documents):
        entry = source.index.entry(number)
        tokens = source.read(entry.start, entry.stop - entry.start)
        yield Document(tokenizer.decode(tokens), entry.id, entry.origin), len(tokens)
