"""Losses of a killed run against what two undisturbed ones differ by, where bits do not repeat."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matilda_train.metrics_log import read_rows

__all__ = ["Noise", "measure_noise"]

# Where training is unstable, rounding grows exponentially, in some pairs of runs earlier than in
# others: ten undisturbed pairs of the hero differed in steps 1 to 17 by 0.006 to 0.045 nats RMS. So
# the noise of a quarter is the larger of its own and of the next one's, and this many times it.
MOST_TIMES_NOISE = 3.0
EXACT = ("tokens", "lr", "skipped", "batch_sha256")


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Differences of training losses, in nats, between runs whose kernels do not repeat bits."""

    rms: list[tuple[float, float]]
    """For each quarter of the run: RMS difference of the victim and of the second twin from the
    twin."""
    largest: tuple[float, float]
    """Largest difference at one step, likewise."""
    redone_steps: int
    """Steps that were done before a kill and again after it, from the same bits."""
    largest_redone: float
    """Largest difference of a redone step's loss from the first time."""
    differences: list[str] = field(default_factory=list)
    """What cannot be noise, a sentence each."""


def measure_noise(twin: Path, second: Path, victim: Path) -> Noise:
    """Compare the victim with the twin, and say what two undisturbed runs differ by."""
    one, two, killed = (_steps(run / "metrics.jsonl") for run in (twin, second, victim))
    found = [
        f"{run.name}: `{name}` of step {step} is {rows[step].get(name)!r}, the twin has "
        f"{one[step].get(name)!r}"
        for run, rows in ((second, two), (victim, killed))
        for step in sorted(one.keys() & rows.keys())
        for name in EXACT
        if rows[step].get(name) != one[step].get(name)
    ]
    if killed.keys() != one.keys():
        found.append(f"{victim.name}: its rows are of other steps than the twin's")
    steps = sorted(one.keys() & two.keys() & killed.keys())
    cuts = [steps[len(steps) * k // 4 : len(steps) * (k + 1) // 4] for k in range(4)]
    cuts = [part for part in cuts if part]
    rms = [(_rms(one, killed, part), _rms(one, two, part)) for part in cuts]
    first_time = _steps(victim / "metrics.discarded.jsonl")
    redone = {step: _gap(first_time, killed, step) for step in first_time.keys() & killed.keys()}
    noise = [max(theirs for _, theirs in rms[k : k + 2]) for k in range(len(rms))]
    for quarter, (part, (mine, _), level) in enumerate(zip(cuts, rms, noise, strict=True), 1):
        again = max((redone[step] for step in part if step in redone), default=0.0)
        for what, difference in (("losses", mine), ("steps done again", again)):
            if difference > MOST_TIMES_NOISE * level:
                found.append(
                    f"{victim.name}: its {what} differ by {difference:.2g} nats in quarter "
                    f"{quarter}, two undisturbed runs by at most {level:.2g} there and just after"
                )
    return Noise(
        rms=rms,
        largest=(_largest(one, killed, steps), _largest(one, two, steps)),
        redone_steps=len(redone),
        largest_redone=max(redone.values(), default=0.0),
        differences=found,
    )


def _steps(path: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in read_rows(path) if row.get("loss_nats") is not None}


Rows = Mapping[int, Mapping[str, Any]]


def _gap(one: Rows, other: Rows, step: int) -> float:
    return float(abs(one[step]["loss_nats"] - other[step]["loss_nats"]))


def _rms(one: Rows, other: Rows, steps: Sequence[int]) -> float:
    return math.sqrt(statistics.fmean(_gap(one, other, step) ** 2 for step in steps))


def _largest(one: Rows, other: Rows, steps: Sequence[int]) -> float:
    return max((_gap(one, other, step) for step in steps), default=0.0)
