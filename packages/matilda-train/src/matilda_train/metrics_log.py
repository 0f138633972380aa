"""`metrics.jsonl` and `events.jsonl`: append-only JSON lines that survive kills and resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from matilda_train.errors import naming

__all__ = ["MACHINE_FIELDS", "EventLog", "MetricsLog", "is_evaluation", "read_rows"]

MACHINE_FIELDS = (
    "step_ms",
    "step_ms_median",
    "throttling",
    "tokens_per_second",
    "data_wait_ms",
    "train_seconds",
    "warm_up_seconds",
    "mfu_palm",
    "mfu_causal",
    "peak_memory_gib",
    "gpu_sm_clock_mhz",
    "gpu_power_watts",
    "gpu_temperature_celsius",
    "gpu_throttle_reasons",
    "uptime_seconds",
    "eval_seconds",
    "restarts",
    "goodput",
)
"""Fields of a row that clocks, allocator and kills decide; a run and its killed and resumed twin
are equal in all others."""


_DECODER = json.JSONDecoder(parse_constant=lambda name: None)


class MetricsLog:
    """One JSON object a line, of an evaluation or of a training step; see `is_evaluation`.

    Opening it for a run restored at `step` (-1 for a new run) moves rows past that step, and a
    line cut short by a kill, to `metrics.discarded.jsonl`, so that the file always reads as one
    uninterrupted run. Only the main process (`enabled`) writes.
    """

    def __init__(
        self,
        path: Path,
        *,
        step: int,
        enabled: bool = True,
    ) -> None:
        self._path = path
        self._enabled = enabled
        self._file: IO[str] | None = None
        self.evaluations: list[dict[str, Any]] = []
        """Rows with a held-out loss so far, oldest first."""
        self.discarded: list[dict[str, Any]] = []
        """Whole rows among those that were set aside last."""
        self.discarded_rows = 0
        """Lines that were set aside last, one cut short by a kill included."""
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Set aside the rows past `step`, as opening does: the run goes on from there."""
        path = self._path
        kept: list[str] = []
        discarded: list[str] = []
        self.evaluations, self.discarded = [], []
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            row = _parse_row(line)
            if row is not None and row["step"] <= step:
                kept.append(line)
                self.evaluations += [row] if "val_loss_nats" in row else []
            else:
                discarded.append(line)
                self.discarded += [row] if row is not None else []
        self.discarded_rows = len(discarded)
        if not self._enabled:
            return
        if discarded:
            aside = path.with_name(f"{path.stem}.discarded.jsonl")
            with naming(aside), aside.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in discarded)
                _make_durable(file)
        if discarded or (text and not text.endswith("\n")):  # the next row begins its own line
            replacement = path.with_name(f".{path.name}.tmp")
            with naming(replacement), replacement.open("w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in kept)
                _make_durable(file)
            replacement.replace(path)
        if self._file is not None:
            self._file.close()
        self._file = path.open("a", encoding="utf-8")

    @property
    def evaluated_step(self) -> int:
        """Step of the newest evaluation, -1 before the first."""
        return int(self.evaluations[-1]["step"]) if self.evaluations else -1

    @property
    def newest_evaluation(self) -> dict[str, float]:
        """Figures of the newest evaluation as a whole, empty before the first."""
        newest = self.evaluations[-1] if self.evaluations else {}
        return {
            name: value
            for name, value in newest.items()
            if name.startswith("val_") and isinstance(value, int | float)
        }

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; numbers that JSON cannot hold (nan, inf) are written as null."""
        plain = {name: _json_number(value) for name, value in row.items()}
        if "val_loss_nats" in plain:
            self.evaluations.append(plain)
        if self._file is not None:
            with naming(self._path):
                self._file.write(json.dumps(plain) + "\n")
                self._file.flush()

    def sync(self) -> None:
        """Make all rows durable; called before a checkpoint that they belong to is committed."""
        if self._file is not None:
            with naming(self._path):
                _make_durable(self._file)

    def close(self) -> None:
        """Close the file; rows already written stay."""
        if self._file is not None:
            with naming(self._path):
                self._file.close()
            self._file = None


class EventLog:
    """`events.jsonl`: start, resume, save, skip, spike, finish, …, each with its UTC time."""

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        self._path = path
        self._enabled = enabled

    def write(self, event: str, **fields: Any) -> None:
        """Append one event durably; nan and inf are written as null."""
        if not self._enabled:
            return
        row = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        fields = {name: _json_number(value) for name, value in fields.items()}
        with naming(self._path), self._path.open("a+b") as file:
            # A kill may have cut the last line short; a fresh line keeps this one readable.
            torn = file.tell() > 0 and not _ends_with_newline(file)
            file.write(("\n" * torn + json.dumps(row | fields) + "\n").encode())
            _make_durable(file)

    def last(self, event: str) -> dict[str, Any] | None:
        """The newest event of that name, or None."""
        named = [row for row in read_rows(self._path) if row.get("event") == event]
        return named[-1] if named else None


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row tells of an evaluation (held-out loss, scores of tasks), not of a step."""
    return "val_loss_nats" in row or "task_scores" in row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSON-lines file; a line cut short by a kill is left out.

    NaN and infinity, which other writers may leave where JSON has no such numbers, are None.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = _parse_object(line)
        if row is not None:
            rows.append(row)
    return rows


def _parse_object(line: str) -> dict[str, Any] | None:
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, a deep nest
        return None
    return row if isinstance(row, dict) else None


def _parse_row(line: str) -> dict[str, Any] | None:
    row = _parse_object(line)
    return row if row is not None and type(row.get("step")) is int else None


def _json_number(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _json_number(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ends_with_newline(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _make_durable(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
