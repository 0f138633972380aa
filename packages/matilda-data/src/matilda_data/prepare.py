"""Text files to a data set: `prepare_text`."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matilda_data.contamination import build_evaluation_set
from matilda_data.documents import ReadOptions
from matilda_data.engine import OPTIONS_OF_PARTS, WORK_DIR, Engine, PlannedSource, prepared
from matilda_data.errors import DataError
from matilda_data.inputs import check_lists, find_files, plan_units
from matilda_data.journal import Journal
from matilda_data.manifest import Manifest, canonical_json, read_incomplete
from matilda_data.packer import PackOptions
from matilda_data.progress import Meter, ProgressCallback
from matilda_data.shard import MAX_TOKENS
from matilda_data.tokenizer import BACKENDS, Tokenizer, load_tokenizer
from matilda_data.worker import load_runner

__all__ = ["Settings", "TextSource", "prepare_text"]

PIPELINE = "matilda-prepare/1"

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A named part of a mixture."""

    name: str
    """Letters, digits, `-` and `.`; part of shard file names."""
    inputs: PathLike | Sequence[PathLike]
    """Files, directories and globs, as in `prepare_text`."""
    weight: int = 1
    """Integer weight in the default mixture: 83 and 17 give 83 and 17 samples of every 100."""

    def __post_init__(self) -> None:
        check_source(self.name, self.weight)


def check_source(name: str, weight: int) -> None:
    """Raise DataError unless `name` and `weight` can be a source's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name):
        raise DataError(f"source name {name!r} is part of file names; use letters, digits, - or .")
    if not isinstance(weight, int) or weight < 1:
        raise DataError(f"source {name!r} has weight {weight!r}; give an integer ≥ 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options that every way of preparing shares; checked here."""

    tokenizer: str
    shard_tokens: int
    val_fraction: float
    workers: int | None
    runner: str
    backend: str
    deduplicate: bool
    read: ReadOptions

    def __post_init__(self) -> None:
        load_tokenizer(self.tokenizer)
        if not isinstance(self.shard_tokens, int) or not 1024 <= self.shard_tokens <= MAX_TOKENS:
            raise DataError(f"`shard_tokens` is {self.shard_tokens!r}; give 1024 to {MAX_TOKENS}")
        if not 0 <= self.val_fraction < 1:
            raise DataError(f"`val_fraction` is {self.val_fraction!r}; give a share in [0, 1)")
        if self.workers is not None and (not isinstance(self.workers, int) or self.workers < 1):
            raise DataError(
                f"`workers` is {self.workers!r}; give an integer ≥ 1, or None for automatic"
            )
        if self.backend not in BACKENDS:
            raise DataError(
                f"`backend` is {self.backend!r}; choose one of {', '.join(map(repr, BACKENDS))}"
            )
        load_runner(self.runner)

    @property
    def encoder(self) -> Tokenizer:
        """The tokenizer."""
        return load_tokenizer(self.tokenizer)

    @property
    def pack(self) -> PackOptions:
        """What the packer is told."""
        return PackOptions(
            shard_tokens=self.shard_tokens,
            val_threshold=min(math.floor(self.val_fraction * 2**64), 2**64 - 1),
            deduplicate=self.deduplicate,
        )

    def unit_settings(self) -> dict[str, Any]:
        """What a part depends on beside its unit."""
        encoder = self.encoder
        return {
            "pipeline": PIPELINE,
            "tokenizer": [encoder.name, encoder.sha256, encoder.pattern],
            **asdict(self.read),
        }

    def preparation(self, inputs: object) -> dict[str, Any]:
        """What the data set's bytes depend on, for the manifest."""
        return {
            "pipeline": PIPELINE,
            "inputs_sha256": hashlib.sha256(canonical_json(inputs)).hexdigest(),
            "tokenizer_sha256": self.encoder.sha256,
            "shard_tokens": self.shard_tokens,
            "val_fraction": self.val_fraction,
            "split_rule": "val if sha256(text)[:8] as a big-endian integer < val_fraction * 2**64",
            "deduplicate": "exact" if self.deduplicate else "none",
            "text_policy": {
                **asdict(self.read),
                "normalization": "none",
                "nul": "kept",
                "empty_documents": "dropped",
            },
        }

    def engine(self, directory: Path, journal: Journal, meter: Meter) -> Engine:
        """The engine that works to these settings."""
        return Engine(
            directory=directory,
            tokenizer=self.encoder,
            read_options=self.read,
            pack_options=self.pack,
            backend=self.backend,
            workers=self.workers,
            runner=load_runner(self.runner),
            meter=meter,
            journal=journal,
        )


def prepare_text(
    inputs: PathLike | Sequence[PathLike] | TextSource | Sequence[TextSource],
    out_dir: PathLike,
    *,
    tokenizer: str = "gpt2",
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.01,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    exclude: Sequence[str] = (),
    include: Callable[[str], bool] | None = None,
    text_field: str = "text",
    invalid_utf8: str = "error",
    deduplicate: bool = True,
    decontaminate: Sequence[PathLike] = (),
    backend: str = "auto",
    runner: str = "local",
    partition: tuple[int, int] | None = None,
    merge: Sequence[PathLike] = (),
    command: str | None = None,
) -> Manifest:
    """Write `inputs` as verified uint16 shards with a manifest into `out_dir`.

    Call it again after any interruption and it continues; a finished data set of the same inputs
    and options is verified, as far as anything has touched it since that was last done, and
    prepared once more if it is damaged. The bytes written depend only on the inputs' content
    and names (relative to the input directory, a file's own directory, or the fixed start of a
    glob) and on the options above `backend`; not on workers, runner, partitions, interruptions or
    absolute paths.

    Args:
        inputs: files, directories (searched for known types; links to directories inside them are
            not followed) and globs; or `TextSource`s for a mixture. One document is a `.txt` or
            `.py` file, a line of `.jsonl` or `.jsonl.zst` (an object with `text`, optional `id` and
            `source`), or a row of `.parquet`.
        out_dir: directory of the data set, made if missing.
        tokenizer: `"gpt2"` or `"byte"`.
        shard_tokens: tokens in each shard but the last of a source and split.
        val_fraction: share of documents held out, in [0, 1); by the hash of the text, so a
            document keeps its side when the corpus grows.
        workers: worker processes; None chooses by CPU count and input size; 1 stays in-process.
        progress: called with a `Progress` after every finished unit.
        exclude: file patterns to leave out (`fnmatch`), matched with the relative path and with
            each of its components: `"test"` leaves out every directory of that name.
        include: called with each relative path; False leaves the file out.
        text_field: JSON key or parquet column that holds the text.
        invalid_utf8: `"error"`, or `"replace"` to put U+FFFD for undecodable bytes.
        deduplicate: drop a document whose text equals an earlier one's, over all sources.
        decontaminate: evaluation sets (`.jsonl`, `.jsonl.gz`); a document that shares 13 words in
            a row with an item is dropped and listed in `contamination.json`.
        backend: what tokenizes: `"tiktoken"`, `"fastokens"` or `"auto"`; the ids are the same.
        runner: `"local"` processes, or `"ray"` for a Ray cluster that shares the file system.
        partition: (i, n) encodes only every n-th unit from the i-th on, into an `out_dir` of its
            own that `merge` takes; the manifest returned is empty and the directory unfinished.
        merge: `out_dir`s of partitions whose work is taken over; what is missing is done here.
        command: shell command that continues this preparation, named in errors until it is done.

    Raises:
        DataError: nothing to read, an unreadable or malformed input, an unknown tokenizer, a bad
            option, an `out_dir` with another data set, with much unfinished work on other inputs,
            or with a preparation still running.
        OSError: a full disk and the like; run it again once that is mended.
    """
    check_lists(exclude=exclude, decontaminate=decontaminate, merge=merge)
    check_partition(partition)
    evaluation = build_evaluation_set(decontaminate) if decontaminate else None
    settings = Settings(
        tokenizer=tokenizer,
        shard_tokens=shard_tokens,
        val_fraction=val_fraction,
        workers=workers,
        runner=runner,
        backend=backend,
        deduplicate=deduplicate,
        read=ReadOptions(
            text_field=text_field,
            invalid_utf8=invalid_utf8,
            evaluation_sha256=evaluation.sha256 if evaluation else "",
        ),
    )
    unit_settings = settings.unit_settings()
    sources = [
        PlannedSource(
            name=source.name,
            weight=source.weight,
            origin={"kind": "files"},
            units=[
                (unit.key(unit_settings), unit)
                for unit in plan_units(
                    find_files(_as_list(source.inputs), exclude=exclude, include=include)
                )
            ],
        )
        for source in _as_sources(inputs)
    ]
    preparation = settings.preparation(
        [[source.name, source.weight, [key for key, _ in source.units]] for source in sources]
    )
    directory = Path(out_dir)

    def prepare(journal: Journal, earlier: Mapping[str, Any] | None) -> Manifest:
        engine = settings.engine(directory, journal, Meter(progress))
        for other in merge:
            take_over(Path(other), engine, preparation)
        mine = sources if partition is None else _own_share(sources, partition)
        if partition is None:
            engine.refuse_other_text(sources, earlier)
        engine.expect(mine)
        engine.encode(mine)
        if partition is not None:
            return Manifest(tokenizer={}, sources=(), shards=(), preparation=preparation)
        return engine.publish(sources, preparation)

    return prepared(directory, preparation, evaluation, command, prepare)


def check_partition(partition: tuple[int, int] | None) -> None:
    """Raise DataError unless `partition` is None or (i, n) with 0 ≤ i < n."""
    if partition is not None and not 0 <= partition[0] < partition[1]:
        raise DataError(f"`partition` is {partition!r}; give (i, n) with 0 ≤ i < n")


def _own_share(sources: list[PlannedSource], partition: tuple[int, int]) -> list[PlannedSource]:
    index, count = partition
    numbered = [item for source in sources for item in source.units]
    mine = {key for key, _ in numbered[index::count]}
    return [
        PlannedSource(
            name=source.name,
            weight=source.weight,
            origin=source.origin,
            units=[item for item in source.units if item[0] in mine],
        )
        for source in sources
    ]


def take_over(other: Path, engine: Engine, preparation: Mapping[str, Any]) -> None:
    """Take the finished parts of the unfinished data set `other` into `engine`'s.

    Raises:
        DataError: `other` holds no such work, or work of no use to this `preparation`.
    """
    work = other / WORK_DIR
    if not (work / "journal.jsonl").exists():
        raise DataError(f"{str(other)!r} holds no partition's work; name the partition's `out_dir`")
    theirs = (read_incomplete(other) or {}).get("preparation", preparation)
    for name in OPTIONS_OF_PARTS:
        if theirs[name] != preparation[name]:
            raise DataError(
                f"partition {str(other)!r} was prepared with `{name}` {theirs[name]!r} and this "
                f"has {preparation[name]!r}; merge with the options of the partitions"
            )
    with_records = Journal(work / "journal.jsonl")
    with_records.close()
    for key, record in with_records.records.items():
        if key in engine.journal.records:
            continue
        for suffix in ("tokens", "docs"):
            name = f"{key}.{suffix}"
            (engine.parts / name).unlink(missing_ok=True)
            try:
                os.link(work / "parts" / name, engine.parts / name)
            except OSError:
                shutil.copyfile(work / "parts" / name, engine.parts / name)
        engine.journal.append(record)


def _as_list(inputs: Any) -> list[Any]:
    return [inputs] if isinstance(inputs, str | os.PathLike | TextSource) else list(inputs)


def _as_sources(
    inputs: PathLike | Sequence[PathLike] | TextSource | Sequence[TextSource],
) -> list[TextSource]:
    items = _as_list(inputs)
    named = [item for item in items if isinstance(item, TextSource)]
    if not named:
        return [TextSource(name="text", inputs=items)]
    if len(named) != len(items):
        raise DataError("`inputs` mixes paths and TextSources; wrap every path in a TextSource")
    names = [source.name for source in named]
    if len(set(names)) != len(names):
        raise DataError(f"source names {names!r} are not distinct")
    return named
