"""What a study consists of: every row with every seed, each an ordinary run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matilda_train.ablation.run_result import EarlierRuns
from matilda_train.ablation.variants import Row
from matilda_train.config import RunConfig
from matilda_train.config_load import config_differences, config_to_dict
from matilda_train.metrics_log import read_rows
from matilda_train.run_dir import check_run_dir

__all__ = ["Job", "Study", "outcome_of"]

MEASURE = (
    *("eval.tokens", "train.spike_", "train.max_consecutive_skips"),
    *("train.max_rollbacks", "train.rollback_margin_steps"),
)
"""What a run's loss is measured on, and which of its steps count."""


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    row: str
    seed: int
    """Number of the seed, from 0."""
    config: RunConfig
    run_dir: Path

    @property
    def key(self) -> tuple[str, int]:
        return self.row, self.seed

    def request(
        self, *, data_dir: Path | None, keep_checkpoints: bool, turn: Path | None = None
    ) -> dict[str, Any]:
        """What a worker is told, as JSON; `turn`: the lock of whoever trains on its device."""
        return {
            "row": self.row,
            "seed": self.seed,
            "config": config_to_dict(self.config),
            "run_dir": str(self.run_dir),
            "data_dir": str(data_dir) if data_dir else None,
            "keep_checkpoints": keep_checkpoints,
            "turn": str(turn) if turn else None,
        }


@dataclass(frozen=True, kw_only=True)
class Study:
    """Rows × seeds in one directory.

    Seed k adds k to `train.seed` (initial weights) and `data.seed` (order of the windows) of every
    row alike, so that the runs of a seed see the same batches.
    """

    rows: Sequence[Row]
    seeds: int
    out: Path
    earlier: EarlierRuns = field(default_factory=EarlierRuns)
    """Runs that ended elsewhere, which `out` need not have."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"`--seeds` is {self.seeds}, but must be 1 or more.")

    @property
    def ledger(self) -> Path:
        """One line a job that was started or ended, over all calls."""
        return self.out / "jobs.jsonl"

    def run_dir(self, row: str, seed: int) -> Path:
        """Where a run lives."""
        return self.out / "runs" / row / f"seed-{seed}"

    def outcome(self, job: Job) -> str | None:
        """`finished` or `diverged` here or earlier elsewhere; None for a run still to be made."""
        known = self.earlier.runs.get(job.key)
        return outcome_of(job.run_dir) or (known.outcome if known else None)

    def jobs(self) -> list[Job]:
        """Every run, a whole seed of all rows before the next: cut short, rows stay comparable.

        Raises `ValueError` where the directory holds a run of another config.
        """
        jobs = []
        for seed in range(self.seeds):
            for row in self.rows:
                config = seeded(row.config, seed)
                run_dir = self.run_dir(row.name, seed)
                _require_same_measure(check_run_dir(run_dir, config, data_id=None), config, run_dir)
                jobs.append(Job(row.name, seed, config, run_dir))
        return jobs


def seeded(config: RunConfig, seed: int) -> RunConfig:
    """The config with its `seed`-th seeds."""
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, seed=config.train.seed + seed),
        data=dataclasses.replace(config.data, seed=config.data.seed + seed),
    )


def _require_same_measure(run: Mapping[str, Any] | None, config: RunConfig, run_dir: Path) -> None:
    """Refuse a run that was measured otherwise, which a resume may change and a study may not."""
    if run is None:
        return
    _, rounding, free = config_differences(run["config"], config)
    changed = {name: how for name, how in (rounding | free).items() if name.startswith(MEASURE)}
    if changed:
        changes = "; ".join(f"`{name}`: {how}" for name, how in changed.items())
        raise ValueError(
            f"The run in {str(run_dir)!r} was made and measured otherwise ({changes}), so that "
            "other rows cannot be compared with it; restore those values, or give another `--out`."
        )


def outcome_of(run_dir: Path) -> str | None:
    """`finished` or `diverged` as the run's own events tell; None while it is neither."""
    for event in reversed(read_rows(run_dir / "events.jsonl")):
        if event.get("event") == "finish":
            return "finished"
        if event.get("event") == "diverged":
            return "diverged"
        if event.get("event") in ("start", "resume"):
            return None
    return None
