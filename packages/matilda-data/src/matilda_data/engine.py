"""The engine under every preparation: units to durable parts, parts to a published data set.

Units become parts in any order, on any number of workers, each recorded in a journal; the packer
turns parts into shards in unit order; the manifest comes last. Killed at any point, the next run
goes on from the journal and ends with the same bytes.

    <data set>/.prepare/lock            held while a preparation runs
    <data set>/.prepare/journal.jsonl   one durable line a finished unit
    <data set>/.prepare/parts/          what units became
    <data set>/.prepare/shards/         shards before they are published
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matilda_data.contamination import (
    REPORT_NAME,
    EvaluationSet,
    load_evaluation_set,
    report,
    store_evaluation_set,
)
from matilda_data.documents import ReadOptions
from matilda_data.durable import TEMP_PREFIX, fsync_directory, write_durably
from matilda_data.errors import DataError
from matilda_data.inputs import WORK_DIR, Unit
from matilda_data.journal import Journal
from matilda_data.manifest import (
    MANIFEST_NAME,
    Manifest,
    read_incomplete,
    read_manifest,
    write_incomplete,
    write_manifest,
)
from matilda_data.packer import PackOptions, SourceParts, pack
from matilda_data.parts import DamagedPartError, PartRecord
from matilda_data.progress import Meter
from matilda_data.tokenizer import Tokenizer
from matilda_data.verify import verify_unless_stamped
from matilda_data.worker import EncodeSettings, run_units

__all__ = ["OPTIONS_OF_PARTS", "WORK_DIR", "Engine", "PlannedSource", "Runner", "prepared"]

logger = logging.getLogger("matilda_data")

# Below this much input, starting worker processes costs more than it saves.
BYTES_PER_WORKER = 16 << 20
# Below this much input a worker, tiktoken is done before fastokens is loaded; the ids are the same.
BYTES_FOR_FASTOKENS = 5 << 20

# What was made of less text than this is made again within seconds, whatever command it was.
TEXT_WORTH_KEEPING = 100_000_000
# Of a preparation, what all its parts depend on beside their text.
OPTIONS_OF_PARTS = ("pipeline", "tokenizer_sha256", "text_policy")

Runner = Callable[[Sequence[tuple[str, Unit]], EncodeSettings, int], Iterator[PartRecord]]
"""Encodes (key, unit) pairs, yielding records as parts become durable, in any order."""


class OtherTextError(DataError):
    """The directory holds unfinished work on other text."""


@dataclass(kw_only=True)
class PlannedSource:
    """A source with its units in order; the hub adds units while it goes."""

    name: str
    weight: int
    origin: Mapping[str, Any]
    units: list[tuple[str, Unit]] = field(default_factory=list)
    """(key, unit) in the order of the data set."""
    train_tokens: int | None = None
    """Documents are taken in order until the train split has this many tokens; None takes all."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One preparation at work in a locked directory."""

    directory: Path
    tokenizer: Tokenizer
    read_options: ReadOptions
    pack_options: PackOptions
    backend: str
    workers: int | None
    runner: Runner | None
    meter: Meter
    journal: Journal
    provide: Callable[[Sequence[Unit]], None] | None = None
    """Called with units about to be encoded, to have their files here."""

    @property
    def work(self) -> Path:
        """Where unfinished work lies."""
        return self.directory / WORK_DIR

    @property
    def parts(self) -> Path:
        """Where parts lie."""
        return self.work / "parts"

    def refuse_other_text(
        self, sources: Sequence[PlannedSource], earlier: Mapping[str, Any] | None
    ) -> None:
        """Raise `OtherTextError` if what lies here is of other text, for it would be deleted.

        `earlier` is the mark that the work here was begun with. Under other options no part could
        be of use, and the user has just chosen them.
        """
        known = self.journal.records
        if (
            earlier is None
            or sum(record.text_bytes for record in known.values()) < TEXT_WORTH_KEEPING
            or any(key in known for source in sources for key, _ in source.units)
        ):
            return
        before, now = earlier.get("preparation", {}), read_incomplete(self.directory) or {}
        if any(before.get(name) != now["preparation"][name] for name in OPTIONS_OF_PARTS):
            return
        tokens = sum(record.tokens for record in known.values())
        command = f" (`{earlier['command']}`)" if earlier.get("command") else ""
        raise OtherTextError(
            f"{str(self.directory)!r} holds {tokens:,} tokens of an unfinished preparation of "
            f"other inputs; finish that with its own command{command}, choose another output "
            "directory, or delete it"
        )

    def expect(self, sources: Sequence[PlannedSource]) -> None:
        """Count the units of `sources`, and what the journal already has of them, for progress."""
        for source in sources:
            for key, unit in source.units:
                self.meter.expect(source.name, unit.input_bytes)
                if (record := self.journal.records.get(key)) is not None:
                    self._count(source.name, unit, record)
        self.meter.report("encode")

    def _count(self, name: str, unit: Unit, record: PartRecord) -> None:
        self.meter.finish(name, unit.input_bytes, record.tokens, record.documents)

    def encode(self, sources: Sequence[PlannedSource]) -> None:
        """Make every part that the journal does not have yet.

        Raises:
            DataError: an input cannot be used.
        """
        places: dict[str, list[tuple[str, Unit]]] = {}
        for source in sources:
            for key, unit in source.units:
                if key not in self.journal.records:
                    places.setdefault(key, []).append((source.name, unit))
        todo = [(key, found[0][1]) for key, found in places.items()]
        if self.provide is not None and todo:
            self.provide([unit for _, unit in todo])
        count = min(self.workers or _automatic_workers(todo), len(todo))
        settings = EncodeSettings(
            directory=str(self.parts.absolute()),
            tokenizer=self.tokenizer.name,
            backend=_worthwhile_backend(self.backend, todo, count),
            options=self.read_options,
        )
        running = (self.runner or run_units)(todo, settings, count)
        try:
            for record in running:
                self.journal.append(record)
                for name, unit in places[record.unit]:
                    self._count(name, unit, record)
                self.meter.report("encode")
        finally:
            if (close := getattr(running, "close", None)) is not None:
                close()

    def source_parts(self, sources: Sequence[PlannedSource]) -> list[SourceParts]:
        """The finished parts of `sources` in order."""
        return [
            SourceParts(
                name=source.name,
                weight=source.weight,
                origin=source.origin,
                records=[self.journal.records[key] for key, _ in source.units],
                train_tokens=source.train_tokens,
            )
            for source in sources
        ]

    def publish(self, sources: Sequence[PlannedSource], preparation: Mapping[str, Any]) -> Manifest:
        """Pack the parts, move the shards in place and write the manifest; then tidy up.

        Parts that prove damaged are made again.

        Raises:
            DataError: there is no document at all, or none of a mixture's source.
        """
        while True:
            try:
                return self._publish(self.source_parts(sources), preparation)
            except DamagedPartError as damaged:
                self.journal.discard(damaged.key)
                self.encode(sources)

    def _publish(self, parts: list[SourceParts], preparation: Mapping[str, Any]) -> Manifest:
        if not any(record.documents for source in parts for record in source.records):
            raise DataError("no documents: every input is empty; give files with text")
        self.meter.report("pack")
        shards_dir = self.work / "shards"
        shutil.rmtree(shards_dir, ignore_errors=True)
        shards_dir.mkdir()
        packed = pack(parts, self.parts, shards_dir, self.tokenizer, self.pack_options)
        for source in packed.sources:
            if len(packed.sources) > 1 and not source.tokens["train"]:
                raise DataError(
                    f"source {source.name!r} has no training document that is not a copy of an "
                    "earlier one, so no mixture has a share of it; give it text or leave it out"
                )
        preparation = {**preparation, "dropped": packed.dropped}
        if self.read_options.evaluation_sha256:
            evaluation = load_evaluation_set(self.work, self.read_options.evaluation_sha256)
            content = report(evaluation, packed.contaminated)
            raw = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
            write_durably(self.directory / REPORT_NAME, raw)
            preparation["contamination_report_sha256"] = hashlib.sha256(raw).hexdigest()
        manifest = Manifest(
            tokenizer=self.tokenizer.identity(),
            sources=tuple(packed.sources),
            shards=tuple(packed.shards),
            preparation=preparation,
        )
        fsync_directory(shards_dir)
        for shard in manifest.shards:
            for name in (shard.file, shard.index_file):
                (shards_dir / name).replace(self.directory / name)
        fsync_directory(self.directory)
        write_manifest(self.directory, manifest)
        tidy(self.directory)
        self.meter.report("done")
        return manifest


def _automatic_workers(todo: Sequence[tuple[str, Unit]]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    useful = sum(unit.input_bytes for _, unit in todo) // BYTES_PER_WORKER
    return max(1, min(cores or 1, useful))


def _worthwhile_backend(backend: str, todo: Sequence[tuple[str, Unit]], workers: int) -> str:
    size = sum(unit.input_bytes for _, unit in todo)
    return "tiktoken" if backend == "auto" and size < BYTES_FOR_FASTOKENS * workers else backend


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[Journal]:
    """Hold the data set's directory for one preparation and open its journal.

    After a bad input with nothing worth keeping, the disk is left as it was.

    Raises:
        DataError: another process is preparing this directory, or it cannot be written in or
            locked.
    """
    created = not directory.exists()
    work = directory / WORK_DIR
    try:
        (work / "parts").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise DataError(
            f"cannot write a data set in {str(directory)!r}: {error.strerror}; choose another "
            "output directory"
        ) from None
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is preparing {str(directory)!r}; wait for it to finish"
            ) from None
        except OSError as error:
            raise DataError(
                f"cannot lock {lock.name!r}: {error.strerror}; choose a directory whose file "
                "system has locks"
            ) from None
        journal = Journal(work / "journal.jsonl")
        try:
            _clear_temporaries(work / "parts")
            yield journal
        except DataError:
            if not any(record.documents for record in journal.records.values()):
                _forget(directory, created)
            raise
        finally:
            journal.close()


def _forget(directory: Path, created: bool) -> None:
    shutil.rmtree(directory / WORK_DIR, ignore_errors=True)
    if read_incomplete(directory) is not None:
        (directory / MANIFEST_NAME).unlink()
    if created and not any(directory.iterdir()):
        directory.rmdir()


def _clear_temporaries(directory: Path) -> None:
    for leftover in directory.glob(f"{TEMP_PREFIX}*"):
        leftover.unlink(missing_ok=True)


def tidy(directory: Path) -> None:
    """Remove what a finished preparation leaves, also one killed right after it had published."""
    _clear_temporaries(directory)
    shutil.rmtree(directory / WORK_DIR, ignore_errors=True)


def prepared(
    directory: Path,
    preparation: Mapping[str, Any],
    evaluation: EvaluationSet | None,
    command: str | None,
    prepare: Callable[[Journal, Mapping[str, Any] | None], Manifest],
) -> Manifest:
    """The data set of `preparation` in `directory`: the one there if undamaged, else `prepare`'s.

    `prepare` is given the journal and the mark of an earlier preparation that has not ended.

    Raises:
        DataError: as `prepare`, `locked` and `finished_manifest`.
    """
    manifest = finished_manifest(directory, preparation)
    if manifest and not (directory / WORK_DIR).exists() and not _damage(directory, manifest):
        return manifest
    with locked(directory) as journal:
        if (manifest := finished_manifest(directory, preparation)) is not None:
            if not (damage := _damage(directory, manifest)):
                tidy(directory)
                return manifest
            logger.warning("%s (which is done now)", damage)
        earlier = read_incomplete(directory)
        write_incomplete(directory, command or "", preparation)
        if evaluation is not None:
            store_evaluation_set(evaluation, directory / WORK_DIR)
        try:
            return prepare(journal, earlier)
        except OtherTextError:
            assert earlier is not None
            write_incomplete(directory, earlier.get("command", ""), earlier["preparation"])
            raise


def _damage(directory: Path, manifest: Manifest) -> str:
    """What is wrong with a finished data set; empty if nothing is."""
    try:
        verify_unless_stamped(directory, manifest)
    except DataError as error:
        return str(error)
    return ""


def finished_manifest(directory: Path, preparation: Mapping[str, Any]) -> Manifest | None:
    """The manifest if `directory` holds the very data set of `preparation`; None if none yet.

    Raises:
        DataError: it holds another finished data set, or a manifest that nobody can read.
    """
    if not (directory / MANIFEST_NAME).exists() or read_incomplete(directory) is not None:
        return None
    try:
        manifest = read_manifest(directory)
    except DataError as error:
        raise DataError(f"{error}, in another directory or after deleting this one") from None
    if any(manifest.preparation.get(name) != value for name, value in preparation.items()):
        raise DataError(
            f"{str(directory)!r} already holds a data set of other inputs or options; "
            "choose another output directory or delete it"
        )
    return manifest
