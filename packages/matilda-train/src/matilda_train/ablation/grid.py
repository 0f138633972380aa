"""Calibration: every combination of a few values of a few fields, and which is best.

`--grid optim.lr=0.002,0.004,0.008 optim.weight_decay=0,0.1` is six rows of a study. With halving,
all of them train for a fraction of the steps, the better half for twice as many, and so on; each
round is a study of its own, its schedule as long as its runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matilda_train.ablation.document import describe_study, describe_unfinished
from matilda_train.ablation.plan import Study
from matilda_train.ablation.results import StudyResult, read_study
from matilda_train.ablation.run_result import EarlierRuns
from matilda_train.ablation.runner import Ending
from matilda_train.ablation.variants import OPTIM_STEPS, Row, change
from matilda_train.config import RunConfig
from matilda_train.config_load import apply_override
from matilda_train.report.section import describe_provenance, replace_section
from matilda_train.report.tables import markdown_table

__all__ = ["describe_grid", "grid_rows", "rank_grid", "run_halving", "write_grid"]


def grid_rows(config: RunConfig, axes: Sequence[str]) -> list[Row]:
    """A row for every combination of `section.field=value,value,…`.

    Raises `ValueError` for an axis that is none, and for values that the config refuses.
    """
    parsed: list[tuple[str, list[Any]]] = []
    for axis in axes:
        field, _, text = axis.partition("=")
        if not text:
            raise ValueError(f"`--grid` takes section.field=VALUE,VALUE…, but got {axis!r}.")
        values = []
        for value in text.split(","):
            sections: dict[str, Any] = {}
            apply_override(sections, f"{field}={value}")
            ((_, fields),) = sections.items()
            values += fields.values()
        if len(values) != len({json.dumps(value) for value in values}):
            raise ValueError(f"`--grid {axis}` names a value twice; give each once.")
        parsed.append((field, values))
    if len({field for field, _ in parsed}) != len(parsed):
        raise ValueError("`--grid` names a field twice; give all of its values at once.")
    rows = []
    for point in itertools.product(*(values for _, values in parsed)):
        fields = dict(zip((field for field, _ in parsed), point, strict=True))
        name = ",".join(f"{f.partition('.')[2]}={_spell(v)}" for f, v in fields.items())
        rows.append(Row(name, "", fields, change(config, name, fields)))
    return rows


def run_halving(
    rows: Sequence[Row],
    *,
    seeds: int,
    out: Path,
    rounds: int,
    run: Callable[[Study], Ending],
    earlier: EarlierRuns | None = None,
) -> tuple[Study, Ending]:
    """The last round that could be run, and how it ended; with one round, a plain study in `out`.

    Round r of R, in `out/round-r`, trains for 2^(r-R) of the steps and keeps the better half of its
    rows for the next. `earlier` runs are those of a plain study.
    """
    if rounds < 1:
        raise ValueError(f"`--halving` is {rounds}, but must be 1 or more rounds.")
    if rounds > 1 and earlier is not None:
        raise ValueError("`--earlier` holds the runs of one round; leave it or `--halving` out.")
    left = list(rows)
    for number in range(rounds):
        share = 0.5 ** (rounds - 1 - number)
        shortened = [dataclasses.replace(r, config=_shorten(r.config, share)) for r in left]
        folder = out if rounds == 1 else out / f"round-{number + 1}"
        study = Study(rows=shortened, seeds=seeds, out=folder, earlier=earlier or EarlierRuns())
        ending = run(study)
        if ending != "complete" or number == rounds - 1:
            return study, ending
        names = [row.name for row in rank_grid(study).rows]
        ranked = sorted(left, key=lambda row: names.index(row.name))
        left = ranked[: math.ceil(len(ranked) / 2)]
    raise AssertionError


def rank_grid(study: Study) -> StudyResult:
    """The points, best mean loss first, each compared with the best; those with a diverged seed
    last.

    Raises `ValueError` while no run has finished.
    """
    ended = {job.row for job in study.jobs() if study.outcome(job) == "finished"}
    finished = [row.name for row in study.rows if row.name in ended]
    if not finished:
        raise ValueError(
            f"No run in {str(study.out)!r} has finished; run the same command again, or try other "
            "values if they diverged."
        )
    losses = _mean_losses(read_study(study, baseline=finished[0]))
    result = read_study(study, baseline=min(losses, key=losses.__getitem__))
    rows = sorted(result.rows, key=lambda row: losses.get(row.name, math.inf))
    return dataclasses.replace(result, rows=rows)


def describe_grid(result: StudyResult) -> str:
    """A ranked grid as lines: the points, the best, and whether it lies inside the grid."""
    return "\n".join([describe_study(result), *_advice(result)])


def write_grid(result: StudyResult, page: str | Path, *, name: str, command: str) -> None:
    """Write a ranked grid as the section `calibration: NAME` of a Markdown page."""
    text = f"## {name}\n\n{_markdown(result, command=command)}"
    replace_section(page, f"calibration: {name}", text, title="Calibration")


def _markdown(result: StudyResult, *, command: str) -> str:
    config = result.config
    tokens = config.plan.tokens(config.train.total_steps)
    table = [["point", "loss, nats", "above the best", "95 % interval", "verdict", "tokens/s"]]
    for row in result.begun:
        loss, found = row.mean("loss_nats"), row.comparison
        speeds = [run.tokens_per_second for run in row.runs if run.tokens_per_second is not None]
        diverged = any(run.outcome == "diverged" for run in row.runs)
        width = f"± {found.half_width:.4f}" if found and found.half_width is not None else "–"
        table.append(
            [
                f"`{row.name}`",
                f"{loss:.4f}" if loss is not None else "–",
                f"{found.difference:+.4f}" if found else "–",
                width,
                "diverged" if diverged else found.verdict if found else "best",
                f"{max(speeds):,.0f}" if speeds else "–",
            ]
        )
    lines = [
        f"{config.model.n_params / 1e6:.2f}M parameters, T={config.seq_len}, "
        f"{tokens / 1e6:,.2f}M tokens a run in {config.train.total_steps:,} steps of "
        f"{config.train.tokens_per_step:,}, {result.seeds} seed(s) a point, "
        f"{config.optim.algorithm}, {config.optim.schedule} schedule.",
        "",
        *markdown_table(table, left=(0, 4)),
    ]
    lines += ["", *(f"- {line}" for line in _advice(result))]
    lines += ["", "Made by", "", "<!-- needs: files -->", "```sh", command, "```", ""]
    lines += [f"with {describe_provenance(result.provenance)}.", *describe_unfinished(result)]
    return "\n".join(lines)


def _mean_losses(result: StudyResult) -> dict[str, float]:
    """Of the points that no seed diverged at, if there are any: survivors flatter the others."""
    finished = [row for row in result.rows if row.losses]
    steady = [row for row in finished if all(run.outcome == "finished" for run in row.runs)]
    return {row.name: statistics.fmean(row.losses.values()) for row in steady or finished}


def _advice(result: StudyResult) -> list[str]:
    best = result.rows[0]
    point = " ".join(f"{field}={_spell(value)}" for field, value in best.fields.items())
    lines = [f"Best: {point}"]
    if all(noise.paired is None for noise in result.noises):
        lines.append("One seed or one point: no measure of noise; repeat the best few with more.")
    else:
        tied = [
            row.name
            for row in result.rows[1:]
            if row.comparison is not None and row.comparison.verdict == "within noise"
        ]
        if tied:
            lines.append(f"Not told from it by this noise: {'; '.join(tied)}")
        lines.append(
            "These very runs chose it, so luck is part of its lead: other seeds tell how much."
        )
    for field in best.fields:
        tried = (row.fields[field] for row in result.begun)
        values = sorted({value for value in tried if isinstance(value, int | float)})
        if len(values) > 1 and best.fields[field] in (values[0], values[-1]):
            lines.append(f"The best lies at the end of `{field}`: widen the grid there.")
    return lines


def _shorten(config: RunConfig, share: float) -> RunConfig:
    """The same run over a share of its steps, warm-ups and intervals in proportion.

    Raises `ValueError` where batch, sequence or mixture change at a step of the whole run.
    """
    if share == 1.0:
        return config
    train, optim = config.train, config.optim
    changing = {
        "train.batch_ramp": train.batch_ramp,
        "train.seq_len_ramp": train.seq_len_ramp,
        "data.mix": [entry for entry in config.data.mix if ":" in entry],
    }
    for field, value in changing.items():
        if value:
            raise ValueError(
                f"`--halving` shortens runs, whose `{field}` {json.dumps(list(value))} is of the "
                "whole run; leave one of them out."
            )
    return dataclasses.replace(
        config,
        train=dataclasses.replace(train, total_steps=max(1, round(train.total_steps * share))),
        optim=dataclasses.replace(
            optim, **{name: round(getattr(optim, name) * share) for name in OPTIM_STEPS}
        ),
        eval=dataclasses.replace(
            config.eval, every_steps=max(1, round(config.eval.every_steps * share))
        ),
    )


def _spell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
