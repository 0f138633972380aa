"""Power cuts on a real file system: replay of a block log, image by image.

A writer saves on ext4 over a `LoggingDisk`. A disk that honours flushes may hold, after a power
cut, everything up to some flush and any part of what was written after it. For each flush, the
images with none, all and random halves of the following writes are built, mounted (which replays
ext4's journal) and judged: what was acknowledged before the next flush must be there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from matilda_ckpt.errors import CheckpointError
from matilda_ckpt.retention import Keep
from matilda_ckpt.torture import writer
from matilda_ckpt.torture.logging_disk import LoggingDisk, why_not

__all__ = ["Matilda", "PowercutVerdict", "Writer", "run", "why_not"]

DISK_BYTES = 24 << 20


class Writer(Protocol):
    """A way to save checkpoints, under test."""

    def save(self, folder: Path, step: int) -> None:
        """Returns when the save counts as acknowledged; also deletes old ones."""

    def judge(self, folder: Path, acknowledged: int) -> tuple[bool, bool, str]:
        """(the acknowledged step or a newer one loads, nothing torn is visible or loaded, why)."""


class Matilda:
    """This package."""

    def save(self, folder: Path, step: int) -> None:
        store = writer.open_store(str(folder))
        store.save(writer.request(step))
        store.retire(Keep(last=2))
        store.release()

    def judge(self, folder: Path, acknowledged: int) -> tuple[bool, bool, str]:
        try:
            problem = writer.judge(str(folder), acknowledged)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        return (
            not (problem and "is lost" in problem),
            not problem or "is lost" in problem,
            str(problem or ""),
        )


@dataclass
class PowercutVerdict:
    """Outcome for one writer."""

    writer: str
    images: int = 0
    acknowledged: int = 0
    lost: int = 0
    """Images in which an acknowledged checkpoint is gone or does not load."""
    nothing: int = 0
    """Of those, images in which no checkpoint at all could be loaded."""
    torn: int = 0
    """Images that show, or load, a torn checkpoint."""
    violations: list[str] = field(default_factory=list)


def run(
    work: Path,
    name: str,
    make: Callable[[], Writer] = Matilda,
    *,
    images: int = 1000,
    saves: int = 12,
    pause_s: float = 0.0,
    seed: int = 0,
) -> PowercutVerdict:
    """Record `saves` saves, then judge about `images` crash images, evenly over the log."""
    verdict = PowercutVerdict(name)
    place = work / "powercut"
    place.mkdir(exist_ok=True)
    log, base, acknowledgements = _record(place, make(), saves, pause_s)
    verdict.acknowledged = len(acknowledgements)
    judge = make()
    total = sum(1 for _ in _images(log, base, images, random.Random(seed)))
    stride = max(1, total // images)
    produced = _images(log, base, images, random.Random(seed))
    for image, position in itertools.islice(produced, 0, None, stride):
        acknowledged = max((s for p, s in acknowledgements if p <= position), default=0)
        with _mounted(place, image) as folder:
            durable, whole, why = judge.judge(folder / "checkpoints", acknowledged)
        verdict.images += 1
        verdict.lost += not durable
        verdict.torn += not whole
        if not durable or not whole:
            verdict.violations.append(f"{name}: crash before flush at {position}: {why}")
    return verdict


def _record(
    place: Path, made: Writer, saves: int, pause_s: float
) -> tuple[list[tuple[int, bytes] | None], bytearray, list[tuple[int, int]]]:
    folder = place / "mnt"
    folder.mkdir(exist_ok=True)
    acknowledgements: list[tuple[int, int]] = []
    with LoggingDisk(place, DISK_BYTES) as disk:
        options = [
            "-q",
            "-F",
            "-b",
            "4096",
            "-E",
            "nodiscard,lazy_itable_init=0,lazy_journal_init=0",
        ]
        subprocess.run(["mkfs.ext4", *options, disk.device], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "commit=1", disk.device, str(folder)], check=True)
        try:
            os.sync()
            base = bytearray(disk._data)
            disk.log.clear()
            (folder / "checkpoints").mkdir()
            for step in range(1, saves + 1):
                made.save(folder / "checkpoints", step)
                acknowledgements.append((len(disk.log), step))
                # Time for the kernel's own commits, so that writers without fsync leave a log too.
                time.sleep(pause_s)
            log = list(disk.log)
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    return log, base, acknowledgements


def _images(
    log: list[tuple[int, bytes] | None], image: bytearray, count: int, rng: random.Random
) -> Iterator[tuple[bytearray, int]]:
    """(disk image, log position of the crash): every flush with none, all and halves after it."""
    epochs: list[list[tuple[int, bytes]]] = [[]]
    ends: list[int] = []
    for position, record in enumerate(log):
        if record is None:
            ends.append(position)
            epochs.append([])
        else:
            epochs[-1].append(record)
    ends.append(len(log))
    choices = sum(1 if not epoch else 2 for epoch in epochs)
    wide = sum(len(epoch) > 1 for epoch in epochs) or 1
    halves = max(1, -(-(count - choices) // wide))
    for epoch, end in zip(epochs, ends, strict=True):
        yield image, end
        for _ in range(halves if len(epoch) > 1 else 0):
            partly = bytearray(image)
            for offset, data in epoch:
                if rng.random() < 0.5:
                    partly[offset : offset + len(data)] = data
            yield partly, end
        if epoch:
            image = bytearray(image)
            for offset, data in epoch:
                image[offset : offset + len(data)] = data
            yield image, end


@contextlib.contextmanager
def _mounted(place: Path, image: bytearray) -> Iterator[Path]:
    memory = Path("/dev/shm")
    file = (memory if memory.is_dir() else place) / f"matilda-powercut-{os.getpid()}.img"
    folder = place / "mnt"
    file.write_bytes(image)
    try:
        subprocess.run(["mount", "-o", "loop", str(file), str(folder)], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    finally:
        file.unlink()
