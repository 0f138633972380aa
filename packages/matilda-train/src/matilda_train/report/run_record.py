"""What a report shows of one run, read from its directory, whatever state that is in."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matilda_model import count_params
from matilda_train.config_load import config_from_dict
from matilda_train.metrics_log import is_evaluation, read_rows
from matilda_train.run_dir import RunDir
from matilda_train.time_account import Goodput, account_time

__all__ = ["RunRecord", "name_runs", "read_run"]

Row = Mapping[str, Any]

MOST_POINTS = 4000
NOT_DRAWN = ("batch_sha256", "gpu_throttle_reasons")


@dataclass(frozen=True)
class RunRecord:
    """One run; rows of training steps and of evaluations apart, each with tokens and time."""

    name: str
    description: Mapping[str, Any]
    """`run.json`."""
    steps: list[dict[str, Any]]
    """Rows of training steps; `tokens` and `seconds` (since the first start) filled in."""
    evaluations: list[dict[str, Any]]
    marks: list[dict[str, Any]]
    """Restarts, refused steps and the like: `kind`, `text`, `step`, `tokens`, `seconds`."""
    goodput: Goodput
    samples: dict[int, str]
    status: str

    @property
    def params(self) -> int | None:
        """Trainable parameters; None for a config that this version cannot read."""
        try:
            return count_params(config_from_dict(self.description["config"]).model)
        except (ValueError, TypeError):
            return None

    @property
    def best_evaluation(self) -> Row | None:
        """The evaluation with the fewest bits per byte."""
        known = [row for row in self.evaluations if _is_number(row.get("val_bits_per_byte"))]
        return min(known, key=lambda row: float(row["val_bits_per_byte"]), default=None)

    def median(self, field: str) -> float | None:
        """Median of a field over the rows that have it."""
        values = [float(row[field]) for row in self.steps if _is_number(row.get(field))]
        return statistics.median(values) if values else None

    def columns(self) -> dict[str, list[Any]]:
        """The training rows as one list a field, thinned out to what a screen can show."""
        return _columns(thin(self.steps))

    def evaluation_columns(self) -> dict[str, list[Any]]:
        """The evaluation rows likewise; every number in them is drawn."""
        return _columns(self.evaluations)


def name_runs(paths: Sequence[Path]) -> list[str]:
    """As many last parts of each path as tell the runs apart."""
    resolved = [path.resolve() for path in paths]
    for length in range(1, 1 + max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-length:]) for path in resolved]
        if len(set(names)) == len(set(resolved)):
            return names
    return [str(path) for path in resolved]


def read_run(path: Path, name: str) -> RunRecord:
    """The run in `path`, finished or not; `ValueError` when it holds none."""
    description = RunDir.read(path)
    events = read_rows(path / "events.jsonl")
    rows = [row for row in read_rows(path / "metrics.jsonl") if _is_step(row.get("step"))]
    account = account_time(events, rows)
    steps = [dict(row) for row in rows if not is_evaluation(row)]
    _fill_in(steps, rows, account)
    evaluations = [_flat(row) for row in rows if is_evaluation(row)]
    evaluations.sort(key=lambda row: int(row["step"]))  # older checkpoints may be scored later
    tokens, seconds = between(steps, "tokens"), between(steps, "seconds")
    for row in evaluations:
        row["tokens"] = tokens(row["step"]) if row["step"] else 0.0
        row["seconds"] = _seconds(row, account, seconds(row["step"]))
    marks = _marks(events, account)
    for mark in marks:
        mark["tokens"] = tokens(mark["step"]) if mark["step"] else 0.0
        mark.setdefault("seconds", seconds(mark["step"]))
    return RunRecord(
        name=name,
        description=description,
        steps=steps,
        evaluations=evaluations,
        marks=marks,
        goodput=account,
        samples=_samples(path),
        status=_status(events),
    )


def describe_mark(event: Row, before: Row | None) -> dict[str, Any] | None:
    """What a person would want to see on a curve at an event's step; None for the others."""
    kind, step = event.get("event"), event.get("step")
    if not _is_step(step):
        return None
    if kind in ("resume", "start"):
        if before is None:
            return None
        stopped = before.get("event") == "preempted"
        how = "stopped by a signal" if stopped else "killed or crashed"
        text = f"{how}, resumed at step {step:,}" if step else f"{how}, started anew"
        lost = event.get("lost_seconds")
        if _is_number(lost) and lost:
            text += f", {lost:,.0f} s of work redone"
        return {"kind": "stop" if stopped else "kill", "step": step, "text": text}
    if kind in ("skip", "spike", "rollback", "diverged"):
        facts = [
            f"{name.replace('_', ' ')} {value:g}"
            for name, value in event.items()
            if name not in ("time", "event", "step") and _is_number(value)
        ]
        text = f"{kind} at step {step:,}" + (f" ({', '.join(facts)})" if facts else "")
        return {"kind": kind, "step": step, "text": text}
    return None


def _marks(events: Sequence[Row], account: Goodput) -> list[dict[str, Any]]:
    marks, life = [], -1
    before: Row | None = None
    for event in events:
        if event.get("event") == "kernels":  # of a life that has not told of its start yet
            continue
        mark = describe_mark(event, before)
        if event.get("event") in ("start", "resume"):
            life += 1
            if mark is not None:
                mark["seconds"] = account.life_begins[life]
        marks += [mark] if mark is not None else []
        # A decay run resumes its parent's checkpoint in its first life: nothing was killed.
        before = event if life >= 0 else None
    return marks


def between(rows: Sequence[Row], field: str) -> Callable[[int], float | None]:
    """A field at any step, interpolated; before the first and after the last row, that row's."""
    known = [(int(row["step"]), float(row[field])) for row in rows if _is_number(row.get(field))]

    def at(step: int) -> float | None:
        index = bisect_left(known, step, key=lambda point: point[0])
        if not known:
            return None
        if index == len(known) or index == 0 or known[index][0] == step:
            return known[min(index, len(known) - 1)][1]
        (before, low), (after, high) = known[index - 1], known[index]
        return low + (step - before) / (after - before) * (high - low)

    return at


def thin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MOST_POINTS` rows: of each stretch those of lowest and highest loss, so that no
    spike is lost, and the last row."""
    if len(rows) <= MOST_POINTS:
        return rows
    size = math.ceil(2 * len(rows) / (MOST_POINTS - 2))
    kept = {len(rows) - 1}
    for first in range(0, len(rows), size):
        stretch = range(first, min(first + size, len(rows)))
        kept.add(min(stretch, key=lambda i: _or(rows[i].get("loss_nats"), math.inf)))
        kept.add(max(stretch, key=lambda i: _or(rows[i].get("loss_nats"), math.inf)))
    return [rows[i] for i in sorted(kept)]


def _fill_in(steps: list[dict[str, Any]], rows: Sequence[Row], account: Goodput) -> None:
    """Give each training row its `seconds`; older files have only the length of a step."""
    elapsed, reached = 0.0, 0
    for row in steps:
        elapsed += max(0, row["step"] - reached) * _or(row.get("step_ms"), 0.0) / 1e3
        reached = row["step"]
        row["seconds"] = _seconds(row, account, elapsed)


def _seconds(row: Row, account: Goodput, otherwise: float | None) -> float | None:
    life, uptime = row.get("restarts"), row.get("uptime_seconds")
    if not isinstance(life, int) or not isinstance(uptime, int | float):
        return otherwise
    if not 0 <= life < len(account.life_begins):
        return otherwise
    return account.life_begins[life] + float(uptime)


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    names = sorted({name for row in rows for name in row} - set(NOT_DRAWN))
    return {name: [_short(row.get(name)) for row in rows] for name in names}


def _short(value: Any) -> Any:
    """Six digits are more than a screen can show, and keep the file small."""
    if isinstance(value, bool) or not isinstance(value, float):
        return value if isinstance(value, bool | int) else None
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _samples(path: Path) -> dict[int, str]:
    found = {}
    for file in sorted((path / "samples").glob("step-*.txt")):
        number = file.stem.removeprefix("step-")
        if number.isdigit():
            found[int(number)] = file.read_text(encoding="utf-8", errors="replace")
    return found


def _status(events: Sequence[Row]) -> str:
    last = next((e["event"] for e in reversed(events) if isinstance(e.get("event"), str)), None)
    return {
        None: "not started",
        "finish": "finished",
        "preempted": "stopped by a signal",
        "diverged": "diverged",
    }.get(last, "running, or killed")


def _flat(row: Row, above: str = "") -> dict[str, Any]:
    """A row whose objects are spread: `{"a": {"b": 0.6}}` has the field `a/b`."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{name}/")
        else:
            flat[above + name] = value
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _or(value: Any, otherwise: float) -> float:
    return float(value) if _is_number(value) else otherwise
