"""One run of a study: what its directory says once it has ended, or an earlier result said."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matilda_train.ablation.variants import Row, change
from matilda_train.config import RunConfig
from matilda_train.config_load import config_from_dict
from matilda_train.metrics_log import read_rows

__all__ = ["FORMAT", "EarlierRuns", "RunResult", "read_earlier", "read_run"]

FORMAT = "matilda-ablation/1"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run that has ended."""

    seed: int
    outcome: str
    """`finished` or `diverged`."""
    loss_nats: float | None
    """Held-out loss at the end, nats a token; None where the run diverged."""
    bits_per_byte: float | None
    curve: list[tuple[int, float]]
    """(tokens trained on, held-out loss) of every evaluation."""
    batches: dict[int, str]
    """Hash of all batches so far, by tokens."""
    tokens_per_second: float | None
    """Median of the fastest tenth of the logged steps, for what else the machine does, as runs that
    compile in the meantime, only slows; None where other runs shared the device."""
    peak_memory_gib: float | None


def read_run(
    run_dir: Path, seed: int, config: RunConfig, outcome: str, *, alone: bool
) -> RunResult:
    """What the directory of a run that has ended says; `alone`: no other run shared its device."""
    rows = read_rows(run_dir / "metrics.jsonl")
    evaluations = [row for row in rows if row.get("val_loss_nats") is not None]
    steps = [row for row in rows if "batch_sha256" in row]
    finished = outcome == "finished" and bool(evaluations)
    speeds = [row["tokens_per_second"] for row in steps[1:]]
    memory = [row["peak_memory_gib"] for row in steps if row.get("peak_memory_gib") is not None]
    return RunResult(
        seed=seed,
        outcome=outcome,
        loss_nats=evaluations[-1]["val_loss_nats"] if finished else None,
        bits_per_byte=evaluations[-1]["val_bits_per_byte"] if finished else None,
        curve=[(config.plan.tokens(row["step"]), row["val_loss_nats"]) for row in evaluations],
        batches={config.plan.tokens(row["step"]): row["batch_sha256"] for row in steps},
        tokens_per_second=_undisturbed(speeds) if speeds and alone else None,
        peak_memory_gib=max(memory, default=None),
    )


def _undisturbed(speeds: list[float]) -> float:
    fastest = sorted(speeds, reverse=True)
    return statistics.median(fastest[: -(-len(fastest) // 10)])


@dataclass(frozen=True)
class EarlierRuns:
    """Runs that ended on a machine which may be gone."""

    runs: Mapping[tuple[str, int], RunResult] = field(default_factory=dict)
    """By row and seed."""
    provenance: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    """Every row that has a run there, asked for or not: `name`, `reason`, `fields`, `runs`."""

    def without(self, keys: Collection[tuple[str, int]]) -> list[dict[str, Any]]:
        """`rows` with the runs of other rows and seeds than `keys`, where there are any."""
        left = []
        for row in self.rows:
            runs = [run for run in row["runs"] if (row["name"], run["seed"]) not in keys]
            if runs:
                left.append({**row, "runs": runs})
        return left


def read_earlier(file: Path, rows: Sequence[Row], base: RunConfig) -> EarlierRuns:
    """The runs of a study's JSON (`StudyResult.to_dict`) for another that has some of its rows.

    Raises `ValueError`, one sentence, where the file is no such result, is of another config than
    `base`, or has a row of the same name that sets other fields.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise KeyError("format")
        theirs: dict[str, dict[str, Any]] = {}
        for row in (*found["rows"], *found.get("other_rows", ())):
            known_row = theirs.setdefault(row["name"], _plain(row, []))
            if known_row["fields"] != row["fields"]:
                raise ValueError(f"two rows {row['name']!r}")
            known_row["runs"] += row["runs"]
        runs = {
            (name, run["seed"]): RunResult(
                **run
                | {
                    "curve": [(tokens, loss) for tokens, loss in run["curve"]],
                    "batches": {int(at): digest for at, digest in run["batches"].items()},
                }
            )
            for name, row in theirs.items()
            for run in row["runs"]
        }
        config, provenance = config_from_dict(found["config"]), dict(found["provenance"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(file)!r} holds no results of a study ({type(error).__name__}: {error}); give "
            "what `--json` wrote, or DIR/ablation.json."
        ) from None
    known = [row for row in rows if row.name in theirs]
    for row in known:
        if theirs[row.name]["fields"] != row.fields:
            raise ValueError(
                f"Row {row.name!r} sets {json.dumps(theirs[row.name]['fields'])} in {str(file)!r} "
                f"and {json.dumps(row.fields)} here; give one of them another name."
            )
    # A grid's JSON has the config of its best point, in which the fields of any other make that.
    differs = any(change(config, row.name, row.fields) != row.config for row in known)
    if differs or (not known and config != base):
        raise ValueError(
            f"The runs in {str(file)!r} are of another config or other `--set`; give the same, or "
            "leave them out."
        )
    names = {row.name for row in rows}
    return EarlierRuns(
        {key: run for key, run in runs.items() if key[0] in names},
        provenance,
        [row for row in theirs.values() if row["runs"]],
    )


def _plain(row: Mapping[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": row["name"], "reason": row["reason"], "fields": row["fields"], "runs": runs}
