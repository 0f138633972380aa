"""Where a run's wall-clock time went, over kills and resumes.

Goodput is the share of the time since the run's first start that went into steps whose results are
part of the run. It is a pure function of `events.jsonl` and `metrics.jsonl`: an event of a life (a
process's part of a run) carries the seconds of each phase so far, a row the seconds since the life
began (`uptime_seconds`) and of the steps it covers (`train_seconds`). Only between two lives is the
calendar clock believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from matilda_train.metrics_log import is_evaluation, read_rows
from matilda_train.phases import PhaseClock

__all__ = ["Goodput", "GoodputLedger", "account_time", "describe_lost_work", "goodput"]

Row = Mapping[str, Any]

LARGEST = 1e18
"""Seconds, steps or lives beyond it are no numbers, but damage."""

BUCKETS = {
    "productive": "training steps that are part of the run",
    "redone": "steps and evaluations lost to a kill or a rollback",
    "skipped": "steps whose update was refused",
    "warming up": "compiling, first step of a process",
    "examining": "autopsies of bad steps",
    "evaluating": "evaluation on held-out data",
    "saving": "the loop stood still for a checkpoint",
    "preparing data": "making the data set",
    "starting": "building model, optimizer and streams",
    "restoring": "reading a checkpoint",
    "sampling": "the sample at the end",
    "between lives": "stopped: waiting for a restart, importing",
    "other": "logging, steps that a stop abandoned, unexplained",
}
"""Every second of a run belongs to one of these; the first is goodput."""

TABLE_PHASES = ("examining", "saving", "preparing data", "starting", "restoring", "sampling")


@dataclass(frozen=True)
class Goodput:
    """A run's account of time."""

    wall_seconds: float
    """From the run's first start to its last sign of life."""

    seconds: dict[str, float]
    """Seconds of each of `BUCKETS`; they add up to `wall_seconds`."""

    restarts: int
    """Lives after the first."""

    life_begins: tuple[float, ...]
    """When each life began, in seconds since the first one did."""

    @property
    def fraction(self) -> float | None:
        """Productive seconds over wall-clock seconds; None for a run without either."""
        return self.seconds["productive"] / self.wall_seconds if self.wall_seconds > 0 else None

    def without_idle(self, seconds: float) -> Goodput:
        """The account as if the run had been started again that much sooner, in all.

        For pauses that are nobody's fault; `life_begins` stays the calendar's.
        """
        idle = min(seconds, self.seconds["between lives"])
        stopped = {"between lives": self.seconds["between lives"] - idle}
        return replace(self, wall_seconds=self.wall_seconds - idle, seconds=self.seconds | stopped)

    def table(self) -> str:
        """The account as lines for a person, empty buckets left out."""
        share = "–" if self.fraction is None else f"{100 * self.fraction:.1f} %"
        lines = [
            f"goodput {share} of {format_seconds(self.wall_seconds)}, {self.restarts} restarts"
        ]
        for name, seconds in self.seconds.items():
            if seconds > 0:
                percent = 100 * seconds / self.wall_seconds
                lines.append(
                    f"  {name:15}{format_seconds(seconds):>11}{percent:7.1f} %  {BUCKETS[name]}"
                )
        return "\n".join(lines)


def goodput(run_dir: str | Path) -> Goodput:
    """The account of the run in `run_dir`, finished, stopped or still in progress."""
    run_dir = Path(run_dir)
    return account_time(read_rows(run_dir / "events.jsonl"), read_rows(run_dir / "metrics.jsonl"))


def describe_lost_work(discarded: Sequence[Row]) -> dict[str, Any]:
    """What a resume event says of the rows that it set aside, oldest first."""
    seen = [row for row in discarded if "uptime_seconds" in row and "restarts" in row]
    lost = sum(_number(row, "train_seconds") + _number(row, "eval_seconds") for row in discarded)
    last = {name: seen[-1][name] for name in ("restarts", "uptime_seconds")} if seen else None
    return {"lost_seconds": round(lost, 3), "last_seen": last}


class GoodputLedger:
    """The account of a run in progress: one value that grows by a row at a time."""

    def __init__(self, run_dir: Path, phase: PhaseClock, *, enabled: bool = True) -> None:
        """Opened when this life's start or resume event is written; not `enabled`, it reads no file
        and accounts for nothing."""
        account = goodput(run_dir) if enabled else account_time((), ())
        self._phase = phase
        self._restarts = account.restarts
        self._before = account.life_begins[-1] if account.life_begins else 0.0
        self._productive = account.seconds["productive"]
        self._step: int | None = None

    def stamp(self, row: Row) -> dict[str, Any]:
        """`row` with `uptime_seconds`, `restarts`, and `goodput` or, evaluated, `eval_seconds`."""
        uptime = self._phase.uptime()
        stamp: dict[str, Any] = {"uptime_seconds": round(uptime, 3), "restarts": self._restarts}
        if is_evaluation(row):
            stamp["eval_seconds"] = round(self._phase.current_seconds(), 3)
        else:
            before = row["step"] - 1 if self._step is None else self._step
            self._productive += _spend(row, row["step"] - before).productive
            self._step = row["step"]
            stamp["goodput"] = self._productive / (self._before + uptime)
        return {**row, **stamp}


@dataclass
class Life:
    """One process's part of a run."""

    begin: float
    """Calendar time, seconds since 1970."""
    first_step: int
    """Step that it started or resumed at."""
    duration: float = 0.0
    table: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase, as its newest event tells."""
    rows: list[Row] = field(default_factory=list)
    """Its rows that are part of the run."""


@dataclass(frozen=True)
class Spending:
    """Seconds of the steps that one row covers."""

    productive: float
    warming_up: float
    skipped: float
    one_step: float


def account_time(events: Sequence[Row], rows: Sequence[Row]) -> Goodput:
    """The account of a run from the rows of its `events.jsonl` and `metrics.jsonl`.

    Fields that an older or damaged file lacks count as nothing, or are estimated from `step_ms`.
    """
    seconds = dict.fromkeys(BUCKETS, 0.0)
    lives = _lives(events)
    if not lives:
        return Goodput(0.0, seconds, 0, ())
    _assign_rows(lives, rows)
    begins, end = [0.0], lives[0].duration
    for before, life in pairwise(lives):
        # A calendar that was set back would make a life begin before the last one ended.
        end += max(0.0, life.begin - (before.begin + before.duration))
        begins.append(end)
        end += life.duration
    seconds["between lives"] = end - sum(life.duration for life in lives)
    seconds["redone"] = sum(_number(event, "lost_seconds") for event in events)
    # A phase's seconds hold evaluations that a kill undid too, which `lost_seconds` tells of.
    evaluations_are_timed = any("eval_seconds" in row for row in rows)
    one_step = 0.0
    for life, following in zip(lives, [*lives[1:], None], strict=True):
        for name in TABLE_PHASES:
            seconds[name] += life.table.get(name, 0.0)
        if evaluations_are_timed:
            seconds["evaluating"] += sum(_number(row, "eval_seconds") for row in life.rows)
        else:
            seconds["evaluating"] += life.table.get("evaluating", 0.0)
        reached = life.first_step
        for row in life.rows:
            if is_evaluation(row):
                continue
            spent = _spend(row, int(row["step"]) - reached)
            seconds["productive"] += spent.productive
            seconds["warming up"] += spent.warming_up
            seconds["skipped"] += spent.skipped
            reached, one_step = int(row["step"]), spent.one_step
        if following is not None and following.first_step > reached:
            # Steps that a checkpoint kept, but no row tells of.
            seconds["productive"] += (following.first_step - reached) * one_step
    # Estimates, a device's clock and damaged files may add up to more than there was.
    for name in seconds:
        excess = max(0.0, sum(seconds.values()) - end)
        seconds[name] = max(0.0, seconds[name] - excess)
    seconds["other"] = max(0.0, end - sum(seconds.values()))
    return Goodput(end, seconds, len(lives) - 1, tuple(begins))


def _lives(events: Iterable[Row]) -> list[Life]:
    lives: list[Life] = []
    for event in events:
        time = _calendar(event)
        if event.get("event") in ("start", "resume"):
            last_seen = event.get("last_seen")
            if isinstance(last_seen, Mapping):
                index = int(_number(last_seen, "restarts"))
                if 0 <= index < len(lives):
                    _lengthen(lives[index], _number(last_seen, "uptime_seconds"))
            begin = time - sum(_table(event).values())
            lives.append(Life(begin=begin, first_step=int(_number(event, "step"))))
        if lives:
            table = _table(event)
            lives[-1].table = table or lives[-1].table
            # Without a table, an older file's event: only the calendar says when it was.
            old = not lives[-1].table
            _lengthen(lives[-1], time - lives[-1].begin if old else sum(table.values()))
    return lives


def _assign_rows(lives: Sequence[Life], rows: Iterable[Row]) -> None:
    for row in rows:
        if not isinstance(row.get("step"), int):
            continue
        index = row.get("restarts")
        if not isinstance(index, int) or not 0 <= index < len(lives):
            index = max((i for i, x in enumerate(lives) if x.first_step < row["step"]), default=0)
        lives[index].rows.append(row)
        _lengthen(lives[index], _number(row, "uptime_seconds"))


def _spend(row: Row, steps: int) -> Spending:
    """What the steps of a row took; `steps` are those since the row before it."""
    spent = _number(row, "train_seconds") or max(steps, 0) * _number(row, "step_ms") / 1e3
    warming_up = min(spent, _number(row, "warm_up_seconds"))
    one_step = (spent - warming_up) / max(steps, 1)
    skipped = int(_number(row, "skipped")) * one_step
    return Spending(spent - warming_up - skipped, warming_up, skipped, one_step)


def _lengthen(life: Life, duration: float) -> None:
    life.duration = max(life.duration, duration)


def _table(event: Row) -> dict[str, float]:
    table = event.get("seconds")
    if not isinstance(table, Mapping):
        return {}
    return {str(name): _number(table, name) for name in table}


def _calendar(event: Row) -> float:
    try:
        return datetime.fromisoformat(event["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0


def _number(row: Row, name: str) -> float:
    """A field as a number; what is missing or no number counts as nothing."""
    value = row.get(name)
    if isinstance(value, int | float) and -LARGEST < value < LARGEST:
        return float(value)
    return 0.0


def format_seconds(seconds: float) -> str:
    """Seconds below two minutes, else hours, minutes and seconds."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
