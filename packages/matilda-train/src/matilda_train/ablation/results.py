"""What the runs of a study say: read from their directories, compared, and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matilda_model import ModelConfig, flops_per_token
from matilda_train.ablation.plan import Study, outcome_of
from matilda_train.ablation.run_result import FORMAT, RunResult, read_run
from matilda_train.ablation.significance import (
    Comparison,
    Noise,
    StepsSaved,
    compare_rows,
    steps_saved,
)
from matilda_train.ablation.variants import BASELINE, Row
from matilda_train.config import RunConfig
from matilda_train.config_load import config_to_dict
from matilda_train.metrics_log import read_rows
from matilda_train.run_dir import RunDir

__all__ = ["RowResult", "RunResult", "StudyResult", "read_study"]


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """A row of the table."""

    name: str
    reason: str
    fields: dict[str, Any]
    n_params: int
    flops_per_token: int
    """Forward and backward, attention as its causal half."""
    runs: list[RunResult]
    comparison: Comparison | None
    """None for the baseline and for rows without a finished run that the baseline has too."""
    steps_saved: StepsSaved | None
    """None where a schedule has no stable phase in common with the baseline's."""
    same_batches: bool
    """Whether the hashes of its batches are the baseline's, seed by seed."""

    def mean(self, name: str) -> float | None:
        """Mean of a figure over the runs that have it."""
        values = [v for v in (getattr(run, name) for run in self.runs) if v is not None]
        return statistics.fmean(values) if values else None

    @property
    def losses(self) -> dict[int, float]:
        return {run.seed: run.loss_nats for run in self.runs if run.loss_nats is not None}


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A whole study, as far as it has come."""

    config: RunConfig
    seeds: int
    rows: list[RowResult]
    seed_sigma: float | None
    """Standard deviation of the baseline's final loss over its seeds; None with one seed."""
    noises: list[Noise]
    provenance: dict[str, list[Any]]
    """Every value found over the runs: `git_sha`, `device`, `torch`, `python`, `data_id`, and the
    `dates` on which they were trained."""
    missing: list[tuple[str, int]]
    """Runs, as (row, seed), that have not ended."""
    other_rows: list[dict[str, Any]] = field(default_factory=list)
    """Runs of `--earlier` that are none of this study, by row, for one that asks for them."""

    @property
    def begun(self) -> list[RowResult]:
        """The rows of which a run has ended."""
        return [row for row in self.rows if row.runs]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "format": FORMAT,
            "config": config_to_dict(self.config),
            "seeds": self.seeds,
            "seed_sigma": self.seed_sigma,
            "noises": [asdict(noise) for noise in self.noises],
            "provenance": self.provenance,
            "missing": self.missing,
            "rows": [asdict(row) for row in self.rows],
            "other_rows": self.other_rows,
        }


def read_study(study: Study, *, baseline: str = BASELINE) -> StudyResult:
    """Everything that has ended so far, each row beside the one named `baseline`.

    Raises `ValueError` while that one has no finished run.
    """
    config = next(row.config for row in study.rows if row.name == baseline)
    shared = _shared(study.ledger)
    runs: dict[str, list[RunResult]] = {}
    missing = []
    for job in study.jobs():
        outcome = outcome_of(job.run_dir)
        if outcome is not None:
            alone = job.key not in shared
            found = read_run(job.run_dir, job.seed, job.config, outcome, alone=alone)
        elif job.key in study.earlier.runs:
            found = study.earlier.runs[job.key]
        else:
            missing.append(job.key)
            continue
        runs.setdefault(job.row, []).append(found)
    losses = {
        row.name: {r.seed: r.loss_nats for r in runs.get(row.name, []) if r.loss_nats is not None}
        for row in study.rows
    }
    if not losses[baseline]:
        raise ValueError(
            f"No run of {baseline!r} in {str(study.out)!r} has finished yet, so nothing can be "
            "compared."
        )
    finished = {name: found for name, found in losses.items() if found}
    kinds = {
        row.name: "same" if same_start(row.config.model, config.model) else "other"
        for row in study.rows
    }
    noises, comparisons = compare_rows(finished, baseline, kinds=kinds)
    base_losses = list(losses[baseline].values())
    rows = [
        _row(row, runs.get(row.name, []), runs[baseline], config, comparisons.get(row.name))
        for row in study.rows
    ]
    return StudyResult(
        config=config,
        seeds=study.seeds,
        rows=rows,
        seed_sigma=statistics.stdev(base_losses) if len(base_losses) > 1 else None,
        noises=noises,
        provenance=_provenance(study),
        missing=missing,
        other_rows=study.earlier.without({job.key for job in study.jobs()}),
    )


def _row(
    row: Row,
    runs: list[RunResult],
    baseline: list[RunResult],
    config: RunConfig,
    comparison: Comparison | None,
) -> RowResult:
    base = {run.seed: run for run in baseline}
    same = row.config.train.tokens_per_step == config.train.tokens_per_step
    return RowResult(
        name=row.name,
        reason=row.reason,
        fields=row.fields,
        n_params=row.config.model.n_params,
        flops_per_token=flops_per_token(row.config.model, row.config.seq_len, causal=True),
        runs=runs,
        comparison=comparison,
        steps_saved=_saved(row.config, runs, config, baseline) if comparison else None,
        same_batches=not same
        or all(
            run.batches[at] == base[run.seed].batches[at]
            for run in runs
            if run.seed in base
            for at in run.batches.keys() & base[run.seed].batches.keys()
        ),
    )


def same_start(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether a seed draws the same initial weights for both models."""
    drawn = (
        *("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "resolved_head_dim"),
        *("mlp", "resolved_d_ff", "tie_embeddings", "value_embeddings", "zero_init_outputs"),
        *("init_std", "resolved_embed_init_std"),
    )
    return all(getattr(one, name) == getattr(other, name) for name in drawn)


def stable_tokens(config: RunConfig) -> int:
    """Tokens until which the learning rate is at its peak; 0 for schedules without such a phase."""
    optim, total = config.optim, config.train.total_steps
    if optim.schedule == "wsd":
        return config.plan.tokens(total - round(optim.decay_fraction * total))
    return config.plan.tokens(total) if optim.schedule == "constant" else 0


def _saved(
    config: RunConfig, runs: Sequence[RunResult], base: RunConfig, baseline: Sequence[RunResult]
) -> StepsSaved | None:
    seeds = {r.seed for r in runs if r.loss_nats} & {r.seed for r in baseline if r.loss_nats}
    end = min(stable_tokens(config), stable_tokens(base))
    curves = [_mean_curve([r for r in side if r.seed in seeds], end) for side in (baseline, runs)]
    return steps_saved(*curves) if all(curves) else None


def _mean_curve(runs: Sequence[RunResult], end: int) -> list[tuple[int, float]]:
    """Mean loss at the evaluations that all runs have, from the first step to `end` tokens."""
    tables = [dict(run.curve) for run in runs]
    if not tables:
        return []
    common = sorted(set.intersection(*(set(table) for table in tables)))
    return [
        (tokens, statistics.fmean(table[tokens] for table in tables))
        for tokens in common
        if 0 < tokens <= end
    ]


def _shared(ledger: Path) -> set[tuple[str, int]]:
    """Runs that any call trained beside others on one device."""
    return {(row["row"], row["seed"]) for row in read_rows(ledger) if row.get("shared")}


def _provenance(study: Study) -> dict[str, list[Any]]:
    found: dict[str, set[Any]] = {}
    for job in study.jobs():
        if outcome_of(job.run_dir) is None:
            continue
        run: Mapping[str, Any] = RunDir.read(job.run_dir)
        packages = run.get("packages") or {}
        for name in ("git_sha", "device", "cuda", "python", "data_id"):
            found.setdefault(name, set()).add(run.get(name))
        found.setdefault("torch", set()).add(packages.get("torch"))
        found.setdefault("uncommitted", set()).add(bool(run.get("git_diff_sha256")))
    times = [row["time"] for row in read_rows(study.ledger)]
    found["dates"] = {datetime.fromtimestamp(time, UTC).date().isoformat() for time in times}
    if any(job.key in study.earlier.runs for job in study.jobs()):
        for name, values in study.earlier.provenance.items():
            found.setdefault(name, set()).update(values)
    return {name: sorted(values, key=str) for name, values in sorted(found.items())}
