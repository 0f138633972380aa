"""All crash suites on one directory's file system, as rows of a verdict table."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from matilda_ckpt.torture import model, powercut, seeded_bugs, syscalls


@dataclass
class Row:
    """One line of the verdict table."""

    suite: str
    case: str
    points: int = 0
    """Places at which the writer was stopped or failed."""
    states: int = 0
    """Distinct disk states judged."""
    violations: list[str] = field(default_factory=list)
    note: str = ""


def run_all(
    folder: Path, *, quick: bool, say: Callable[[str], None] = lambda _text: None
) -> list[Row]:
    """Every suite that this machine can run; the others say why not in `note`."""
    rows: list[Row] = []
    # The suites' own processes work in other directories; Python before 3.12 keeps it relative.
    work = Path(tempfile.mkdtemp(prefix=".torture-", dir=folder.absolute()))
    try:
        for suite in (_model, _seeded, _syscalls, _power_cuts):
            for row in suite(work, quick):
                rows.append(row)
                say(f"{row.suite}: {row.case}: {len(row.violations)} violations {row.note}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return rows


def _model(work: Path, quick: bool) -> Iterator[Row]:
    for name in model.SCENARIOS:
        if quick and name == "two writers":
            yield Row("model", name, note="skipped by --quick")
            continue
        verdict = model.explore(name)
        yield Row("model", name, verdict.crash_points, verdict.states, verdict.violations)


def _seeded(work: Path, quick: bool) -> Iterator[Row]:
    caught, missed = 0, []
    for name, bug in seeded_bugs.BUGS.items():
        verdict = model.explore(bug.scenario, bug.make, bug.fs())
        if verdict.violations:
            caught += 1
        else:
            missed.append(f"seeded bug not noticed: {name}")
    note = f"{caught} of {len(seeded_bugs.BUGS)} caught"
    yield Row("seeded bugs", "all", len(seeded_bugs.BUGS), 0, missed, note)


def _syscalls(work: Path, quick: bool) -> Iterator[Row]:
    reason = syscalls.why_not()
    if reason:
        yield Row("system calls", "all", note=f"skipped: {reason}")
        return
    place = work / "syscalls"
    place.mkdir()
    faults = (syscalls.KILL, "EIO") if quick else (syscalls.KILL, *syscalls.ERRORS)
    calls = syscalls.CHANGING_CALLS if quick else syscalls.CALLS
    for verdict in syscalls.sweep(place, faults, calls=calls, every=3 if quick else 1):
        case = f"{verdict.fault} at {verdict.call}"
        yield Row("system calls", case, verdict.points, verdict.points, verdict.violations)


def _power_cuts(work: Path, quick: bool) -> Iterator[Row]:
    reason = powercut.why_not()
    if reason:
        yield Row("power cut", "ext4", note=f"skipped: {reason}")
        return
    verdict = powercut.run(work, "matilda-ckpt", images=60 if quick else 1000)
    yield Row(
        "power cut",
        "ext4 on a logging disk",
        verdict.images,
        verdict.images,
        verdict.violations,
        f"{verdict.acknowledged} acknowledged saves",
    )
