"""Text files to a data set: `prepare_text`.

Inputs divide into units; units become durable parts, in any order, on any number of workers, each
recorded in a journal; the packer turns parts into shards in unit order; the manifest comes last.
Killed at any point, the next call goes on from the journal and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matilda_data.documents import ReadOptions
from matilda_data.durable import TEMP_PREFIX, fsync_directory
from matilda_data.errors import DataError
from matilda_data.inputs import Unit, find_files, plan_units
from matilda_data.journal import Journal
from matilda_data.manifest import (
    MANIFEST_NAME,
    Manifest,
    canonical_json,
    read_incomplete,
    read_manifest,
    write_incomplete,
    write_manifest,
)
from matilda_data.packer import PackOptions, SourceParts, pack
from matilda_data.parts import DamagedPartError, PartRecord
from matilda_data.shard import MAX_TOKENS
from matilda_data.tokenizer import Tokenizer, load_tokenizer
from matilda_data.worker import EncodeSettings, run_units

__all__ = ["Progress", "TextSource", "prepare_text"]

PIPELINE = "matilda-prepare/1"
WORK_DIR = ".prepare"
# Below this much input, starting worker processes costs more than it saves.
BYTES_PER_WORKER = 16 << 20

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a preparation is: plain numbers for a progress bar. All counts only grow."""

    stage: str
    """`"encode"`, `"pack"` or `"done"`."""
    tokens: int
    """Tokens encoded so far, end-of-text included, resumed work included."""
    documents: int
    """Documents encoded so far."""
    bytes_done: int
    """Input bytes (uncompressed) encoded so far."""
    bytes_total: int
    """Input bytes (uncompressed) in all."""
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    """`tokens` per source name."""


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
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", self.name):
            raise DataError(
                f"source name {self.name!r} is part of file names; use letters, digits, - or ."
            )
        if not isinstance(self.weight, int) or self.weight < 1:
            raise DataError(f"source {self.name!r} has weight {self.weight!r}; give an integer ≥ 1")


def prepare_text(
    inputs: PathLike | Sequence[PathLike] | Sequence[TextSource],
    out_dir: PathLike,
    *,
    tokenizer: str = "gpt2",
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.01,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    exclude: Sequence[str] = (),
    include: Callable[[str], bool] | None = None,
    text_field: str = "text",
    invalid_utf8: str = "error",
    deduplicate: bool = True,
    command: str | None = None,
) -> Manifest:
    """Write `inputs` as verified uint16 shards with a manifest into `out_dir`.

    Call it again after any interruption and it continues; on a finished data set of the same
    inputs and options it returns at once. The bytes written depend only on the inputs' content
    and names (relative to the input directory, a file's own directory, or the fixed start of a
    glob) and on the options, not on `workers`, interruptions or absolute paths.

    Args:
        inputs: files, directories (searched for known types) and globs; or `TextSource`s for a
            mixture. One document is a `.txt` or `.py` file, a line of `.jsonl` or `.jsonl.zst`
            (an object with `text`, optional `id` and `source`), or a row of `.parquet`.
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
        command: shell command that continues this preparation, named in errors until it is done.

    Raises:
        DataError: nothing to read, an unreadable or malformed input, an unknown tokenizer, a bad
            option, an `out_dir` with another data set or with a preparation still running.
    """
    encoder = load_tokenizer(tokenizer)
    _check_options(shard_tokens, val_fraction, workers, invalid_utf8)
    sources = _as_sources(inputs)
    options = ReadOptions(text_field=text_field, invalid_utf8=invalid_utf8)
    units = [
        plan_units(find_files(_as_list(source.inputs), exclude=exclude, include=include))
        for source in sources
    ]
    pack_options = PackOptions(
        shard_tokens=shard_tokens,
        val_threshold=min(math.floor(val_fraction * 2**64), 2**64 - 1),
        deduplicate=deduplicate,
    )
    plan = _Plan(sources, units, encoder, options, pack_options, val_fraction)
    directory = Path(out_dir)
    work = directory / WORK_DIR
    if (finished := _finished(directory, plan)) is not None and not work.exists():
        return finished
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    with _exclusive(work):
        if (finished := _finished(directory, plan)) is not None:
            _tidy(directory, work)  # a run was killed after it had published
            return finished
        try:
            return _run(plan, directory, work, workers, progress, command)
        except DataError:
            _forget_if_nothing_done(directory, work, created)
            raise


class _Plan:
    """Everything the output bytes depend on."""

    def __init__(
        self,
        sources: Sequence[TextSource],
        units: Sequence[Sequence[Unit]],
        tokenizer: Tokenizer,
        options: ReadOptions,
        pack_options: PackOptions,
        val_fraction: float,
    ) -> None:
        settings = {
            "pipeline": PIPELINE,
            "tokenizer": [tokenizer.name, tokenizer.sha256, tokenizer.pattern],
            **asdict(options),
        }
        self.sources = sources
        self.tokenizer = tokenizer
        self.options = options
        self.pack_options = pack_options
        self.units = [[(unit.key(settings), unit) for unit in group] for group in units]
        inputs = [
            [source.name, source.weight, [key for key, _ in group]]
            for source, group in zip(sources, self.units, strict=True)
        ]
        self.preparation: dict[str, Any] = {
            "pipeline": PIPELINE,
            "inputs_sha256": hashlib.sha256(canonical_json(inputs)).hexdigest(),
            "shard_tokens": pack_options.shard_tokens,
            "val_fraction": val_fraction,
            "split_rule": "val if sha256(text)[:8] as a big-endian integer < val_fraction * 2**64",
            "deduplicate": "exact" if pack_options.deduplicate else "none",
            "text_policy": {
                **asdict(options),
                "normalization": "none",
                "nul": "kept",
                "empty_documents": "dropped",
            },
        }
        self.id = hashlib.sha256(canonical_json(self.preparation)).hexdigest()


def _check_options(
    shard_tokens: int, val_fraction: float, workers: int | None, invalid_utf8: str
) -> None:
    if not isinstance(shard_tokens, int) or not 1024 <= shard_tokens <= MAX_TOKENS:
        raise DataError(f"`shard_tokens` is {shard_tokens!r}; give 1024 to {MAX_TOKENS}")
    if not 0 <= val_fraction < 1:
        raise DataError(f"`val_fraction` is {val_fraction!r}; give a share in [0, 1)")
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise DataError(f"`workers` is {workers!r}; give an integer ≥ 1, or None for automatic")
    if invalid_utf8 not in ("error", "replace"):
        raise DataError(f"`invalid_utf8` is {invalid_utf8!r}; choose 'error' or 'replace'")


def _as_list(inputs: PathLike | Sequence[PathLike]) -> list[PathLike]:
    return [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)


def _as_sources(
    inputs: PathLike | Sequence[PathLike] | Sequence[TextSource],
) -> list[TextSource]:
    items: list[Any] = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    named = [item for item in items if isinstance(item, TextSource)]
    if not named:
        return [TextSource(name="text", inputs=items)]
    if len(named) != len(items):
        raise DataError("`inputs` mixes paths and TextSources; wrap every path in a TextSource")
    names = [source.name for source in named]
    if len(set(names)) != len(names):
        raise DataError(f"source names {names!r} are not distinct")
    return named


def _finished(directory: Path, plan: _Plan) -> Manifest | None:
    """The manifest if `directory` holds the very data set of `plan`; None if it is to be made."""
    if not (directory / MANIFEST_NAME).exists() or read_incomplete(directory) is not None:
        return None
    manifest = read_manifest(directory)
    made = {**manifest.preparation}
    made.pop("dropped", None)
    if made != plan.preparation:
        raise DataError(
            f"{str(directory)!r} already holds a data set of other inputs or options; "
            "choose another output directory or delete it"
        )
    return manifest


@contextlib.contextmanager
def _exclusive(work: Path) -> Iterator[None]:
    work.mkdir(exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"another process is preparing {str(work.parent)!r}; wait for it to finish"
            ) from None
        yield


def _forget_if_nothing_done(directory: Path, work: Path, created: bool) -> None:
    """After a bad input with nothing worth keeping yet, leave the disk as it was."""
    journal = Journal(work / "journal.jsonl")
    journal.close()
    if any(record.documents for record in journal.records.values()):
        return
    shutil.rmtree(work, ignore_errors=True)
    if read_incomplete(directory) is not None:
        (directory / MANIFEST_NAME).unlink()
    if created and not any(directory.iterdir()):
        directory.rmdir()


def _run(
    plan: _Plan,
    directory: Path,
    work: Path,
    workers: int | None,
    progress: Callable[[Progress], None] | None,
    command: str | None,
) -> Manifest:
    write_incomplete(directory, plan.id, command or "")
    parts = work / "parts"
    parts.mkdir(exist_ok=True)
    journal = Journal(work / "journal.jsonl")
    try:
        _clear_temporaries(parts)
        while True:
            _encode(plan, journal, parts, workers, progress)
            try:
                return _publish(plan, journal, directory, work, progress)
            except DamagedPartError as damaged:
                journal.discard(damaged.key)
    finally:
        journal.close()


def _clear_temporaries(directory: Path) -> None:
    for leftover in directory.glob(f"{TEMP_PREFIX}*"):
        leftover.unlink(missing_ok=True)


def _tidy(directory: Path, work: Path) -> None:
    _clear_temporaries(directory)
    shutil.rmtree(work)


class _Meter:
    """Sums finished parts for `Progress`."""

    def __init__(self, plan: _Plan, progress: Callable[[Progress], None] | None) -> None:
        self._progress = progress
        self._places: dict[str, list[tuple[str, int]]] = {}
        for source, group in zip(plan.sources, plan.units, strict=True):
            for key, unit in group:
                self._places.setdefault(key, []).append((source.name, unit.input_bytes))
        self._tokens = {source.name: 0 for source in plan.sources}
        self._documents = self._bytes = 0
        self._total = sum(size for places in self._places.values() for _, size in places)

    def add(self, record: PartRecord) -> None:
        for name, size in self._places.get(record.unit, ()):
            self._tokens[name] += record.tokens
            self._documents += record.documents
            self._bytes += size

    def report(self, stage: str) -> None:
        if self._progress is not None:
            self._progress(
                Progress(
                    stage=stage,
                    tokens=sum(self._tokens.values()),
                    documents=self._documents,
                    bytes_done=self._bytes,
                    bytes_total=self._total,
                    source_tokens=dict(self._tokens),
                )
            )


def _encode(
    plan: _Plan,
    journal: Journal,
    parts: Path,
    workers: int | None,
    progress: Callable[[Progress], None] | None,
) -> None:
    meter = _Meter(plan, progress)
    todo: dict[str, Unit] = {}
    for key, unit in (item for group in plan.units for item in group):
        if key not in journal.records:
            todo[key] = unit
    for key in {key for group in plan.units for key, _ in group} - set(todo):
        meter.add(journal.records[key])
    meter.report("encode")
    settings = EncodeSettings(
        directory=str(parts.absolute()), tokenizer=plan.tokenizer.name, options=plan.options
    )
    count = workers or _automatic_workers(list(todo.values()))
    running = run_units(list(todo.items()), settings, min(count, len(todo)))
    with contextlib.closing(running):
        for record in running:
            journal.append(record)
            meter.add(record)
            meter.report("encode")
    if not any(record.documents for record in journal.records.values()):
        raise DataError("no documents: every input is empty; give files with text")


def _automatic_workers(todo: Sequence[Unit]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    useful = sum(unit.input_bytes for unit in todo) // BYTES_PER_WORKER
    return max(1, min(cores or 1, useful))


def _publish(
    plan: _Plan,
    journal: Journal,
    directory: Path,
    work: Path,
    progress: Callable[[Progress], None] | None,
) -> Manifest:
    meter = _Meter(plan, progress)
    for key in {key for group in plan.units for key, _ in group}:
        meter.add(journal.records[key])
    meter.report("pack")
    shards_dir = work / "shards"
    shutil.rmtree(shards_dir, ignore_errors=True)
    shards_dir.mkdir()
    records = [
        SourceParts(
            name=source.name,
            weight=source.weight,
            origin={"kind": "files"},
            records=[journal.records[key] for key, _ in group],
        )
        for source, group in zip(plan.sources, plan.units, strict=True)
    ]
    sources, shards, duplicates = pack(
        records, work / "parts", shards_dir, plan.tokenizer, plan.pack_options
    )
    empty = sum(record.empty for source in records for record in source.records)
    encoder = plan.tokenizer
    manifest = Manifest(
        tokenizer={
            "name": encoder.name,
            "vocab_size": encoder.vocab_size,
            "eot_id": encoder.eot_id,
            "sha256": encoder.sha256,
            "pattern": encoder.pattern,
        },
        sources=tuple(sources),
        shards=tuple(shards),
        preparation={**plan.preparation, "dropped": {"duplicates": duplicates, "empty": empty}},
    )
    fsync_directory(shards_dir)
    for shard in shards:
        for name in (shard.file, shard.index_file):
            (shards_dir / name).replace(directory / name)
    fsync_directory(directory)
    write_manifest(directory, manifest)
    _tidy(directory, work)
    meter.report("done")
    return manifest
