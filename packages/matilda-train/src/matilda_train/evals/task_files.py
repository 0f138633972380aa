"""Evaluation sets in local files, one item a line of `TASK_SPLIT.jsonl` or `.jsonl.gz`.

Every item has `context`, the whole prompt without a space at its end, and one of

- `choices` and `label`: which of the strings follows, each after a space;
- `contexts`, `continuation` and `label`: after which of the contexts the continuation, after a
  space, is likeliest (WinoGrande's "partial" scoring; `context` is not looked at);
- `continuation`: what follows as it stands, its space included; right if greedy decoding gives it.

`id` names the item; without one it is the number of its line, from 0.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["TaskFile", "TaskItem", "find_task_file", "known_tasks", "read_task", "read_tasks"]

SUFFIXES = (".jsonl.gz", ".jsonl")
SPLITS = ("test", "val", "validation")

Kind = Literal["choices", "contexts", "continuation"]


@dataclass(frozen=True)
class TaskItem:
    """One question."""

    id: str
    texts: tuple[tuple[str, str], ...]
    """(context, continuation) of each answer."""
    lengths: tuple[int, ...]
    """Characters of each answer, without the space before it; what `acc_norm` divides by."""
    label: int
    """The right one; 0 where there is only one."""


@dataclass(frozen=True)
class TaskFile:
    """A task's items and where they came from."""

    name: str
    kind: Kind
    items: tuple[TaskItem, ...]
    path: Path
    sha256: str
    """Of the file's bytes."""


def read_tasks(
    folder: str | Path, names: Sequence[str], *, limit: int | None = None
) -> list[TaskFile]:
    """The tasks called `names`, each with its first `limit` items.

    Raises `ValueError` for a task that is not there and for a malformed file, naming its line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"The folder of evaluation tasks {str(folder)!r} does not exist; name the one that has "
            "NAME.jsonl or NAME.jsonl.gz of each task, or leave `--task-dir` out to load them from "
            "the hub."
        )
    return [read_task(name, find_task_file(folder, name), limit=limit) for name in names]


def find_task_file(folder: Path, name: str) -> Path:
    """`NAME`, `NAME_test`, `NAME_val` or `NAME_validation`, the first that is there."""
    for stem in (name, *(f"{name}_{split}" for split in SPLITS)):
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    raise ValueError(
        f"Task {name!r} is not among those of {str(folder)!r}; it has "
        f"{', '.join(known_tasks(folder)) or 'none'}."
    )


def known_tasks(folder: Path) -> list[str]:
    """Tasks that have a file in `folder`."""
    stems = {
        path.name.removesuffix(suffix) for suffix in SUFFIXES for path in folder.glob(f"*{suffix}")
    }
    names = set()
    for stem in stems:
        name, _, split = stem.rpartition("_")
        names.add(name if split in SPLITS and name else stem)
    return sorted(names)


def read_task(name: str, path: Path, *, limit: int | None = None) -> TaskFile:
    """The items of one file; errors as those of `read_tasks`."""
    items: list[TaskItem] = []
    kind: Kind | None = None
    for number, raw in _lines(path):
        if limit is not None and len(items) == limit:
            break
        where = f"Line {number} of {str(path)!r}"
        row = _parse(raw, where)
        own: Kind = (
            "contexts" if "contexts" in row else "choices" if "choices" in row else "continuation"
        )
        kind = kind or own
        if own != kind:
            raise ValueError(f"{where} has `{own}`, but the lines before it have `{kind}`.")
        items.append(_item(row, own, where, str(row.get("id", number - 1))))
    if kind is None:
        raise ValueError(f"{str(path)!r} holds no items.")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return TaskFile(name, kind, tuple(items), path, sha256)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8") as lines:
            yield from enumerate(lines, start=1)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"Cannot read the evaluation task {str(path)!r}: {error}.") from None


def _parse(raw: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(raw)
    except ValueError:
        raise ValueError(f"{where} is not JSON.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object.")
    return row


def _item(row: dict[str, Any], kind: Kind, where: str, name: str) -> TaskItem:
    if kind == "continuation":
        context, continuation = _text(row, "context", where), _text(row, "continuation", where)
        return TaskItem(name, ((context, continuation),), (len(continuation),), 0)
    if kind == "contexts":
        contexts, continuation = _texts(row, "contexts", where), _text(row, "continuation", where)
        return TaskItem(
            name,
            tuple((context, f" {continuation}") for context in contexts),
            (len(continuation),) * len(contexts),
            _label(row, len(contexts), where),
        )
    context, choices = _text(row, "context", where, empty=True), _texts(row, "choices", where)
    return TaskItem(
        name,
        tuple((context, f" {choice}") for choice in choices),
        tuple(len(choice) for choice in choices),
        _label(row, len(choices), where),
    )


def _text(row: dict[str, Any], field: str, where: str, *, empty: bool = False) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"{where} needs a text as `{field}`, but has {value!r}.")
    return value


def _texts(row: dict[str, Any], field: str, where: str) -> list[str]:
    values = row.get(field)
    good = isinstance(values, list) and all(isinstance(v, str) and v for v in values)
    if not good or len(values or ()) < 2:
        raise ValueError(f"{where} needs a list of two texts or more as `{field}`.")
    assert isinstance(values, list)
    return values


def _label(row: dict[str, Any], n: int, where: str) -> int:
    label = row.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < n:
        raise ValueError(f"{where} needs a `label` from 0 to {n - 1}, but has {label!r}.")
    return label
