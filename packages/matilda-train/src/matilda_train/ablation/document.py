"""A study for people: a table on the terminal, and a page of Markdown with a plot."""

from __future__ import annotations

import json
import re
from pathlib import Path

from matilda_train.ablation.forest import draw_forest
from matilda_train.ablation.results import RowResult, StudyResult, stable_tokens
from matilda_train.report.section import describe_provenance, replace_section
from matilda_train.report.tables import markdown_table, plain_table

__all__ = ["describe_study", "describe_unfinished", "write_document"]

HEAD = (
    ("row", ""),
    ("loss, nats", "loss"),
    ("difference", "difference"),
    ("95 % interval", "interval"),
    ("verdict", "verdict"),
    ("tokens saved", "saved"),
    ("parameters", "params"),
    ("MFLOP/token", "flops"),
    ("tokens/s", "speed"),
    ("GiB", "memory"),
)
LEFT = (0, 4)
KINDS = {
    "same": "rows that begin with the baseline's weights",
    "other": "rows of other shapes or other initial weights",
}


def describe_study(result: StudyResult) -> str:
    """The table and what to know about it, in lines of plain text."""
    lines = [*plain_table(_table(result), left=LEFT), "", *_noise_lines(result)]
    if result.missing:
        runs = _count(len(result.missing), "run")
        lines.append(f"{runs} not ended yet; the same command without `--report` goes on.")
    return "\n".join(lines)


def write_document(result: StudyResult, page: str | Path, *, name: str, command: str) -> None:
    """Write the section `ablation: NAME` of a Markdown page, and its plot as `PAGE-NAME.svg`.

    In the file's name, which a link holds, anything but letters, digits, `_`, `.` and `-` is a `-`.
    """
    page = Path(page)
    plot = page.with_name(f"{page.stem.lower()}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.svg")
    page.parent.mkdir(parents=True, exist_ok=True)
    plot.write_text(draw_forest(result), encoding="utf-8")
    text = markdown(result, command=command, plot=plot.name)
    replace_section(page, f"ablation: {name}", f"## {name}\n\n{text}", title="Ablations")


def markdown(result: StudyResult, *, command: str, plot: str) -> str:
    """The section of a page."""
    config = result.config
    tokens = config.plan.tokens(config.train.total_steps)
    model = config.model
    lines = [
        f"{_amount(model.n_params)} parameters ({model.n_layers} layers × {model.d_model}, "
        f"{model.n_heads} heads, {model.n_kv_heads} for keys and values, T={config.seq_len}), "
        f"{_amount(tokens)} tokens a run in {config.train.total_steps:,} steps of "
        f"{config.train.tokens_per_step:,}, {_count(result.seeds, 'seed')} a row, "
        f"{config.optim.schedule} schedule.",
        "",
        f"![Differences from the baseline]({plot})",
        "",
        *markdown_table(_table(result), left=LEFT),
        "",
        *(f"- {line}" for line in _noise_lines(result)),
        *(f"- {line}" for line in _reading_lines(result)),
        "",
        "| row | asks | sets |",
        "|---|---|---|",
        *(
            f"| {row.name} | {row.reason} | "
            f"{', '.join(f'`{k}={json.dumps(v)}`' for k, v in row.fields.items()) or '–'} |"
            for row in result.begun
        ),
        "",
        "Made by",
        "",
        "<!-- needs: files -->",
        "```sh",
        command,
        "```",
        "",
        f"with {describe_provenance(result.provenance)}.",
        *describe_unfinished(result),
    ]
    return "\n".join(lines)


def describe_unfinished(result: StudyResult) -> list[str]:
    """A paragraph of Markdown that names the runs that have not ended; nothing where all have."""
    if not result.missing:
        return []
    begun = {row.name for row in result.begun}
    whole = list(dict.fromkeys(name for name, _ in result.missing if name not in begun))
    runs = [f"{name} seed {seed}" for name, seed in result.missing if name in begun]
    if whole:
        runs.append(f"all of {', '.join(whole)}")
    return ["", f"Not ended when this was written: {', '.join(runs)}."]


def _table(result: StudyResult) -> list[list[str]]:
    return [[title for title, _ in HEAD], *(_cells(result, row) for row in result.begun)]


def _cells(result: StudyResult, row: RowResult) -> list[str]:
    loss = row.mean("loss_nats")
    diverged = sum(run.outcome == "diverged" for run in row.runs)
    found = row.comparison
    saved = row.steps_saved
    speed = max((v for run in row.runs if (v := run.tokens_per_second) is not None), default=None)
    memory = row.mean("peak_memory_gib")
    texts = {
        "": row.name,
        "loss": f"{loss:.4f}" if loss is not None else "–",
        "difference": f"{found.difference:+.4f}" if found else "–",
        "interval": f"± {found.half_width:.4f}" if found and found.half_width is not None else "–",
        "verdict": found.verdict if found else "",
        "saved": f"{round(100 * saved.fraction) or 0:+d} %" if saved else "–",
        "params": _amount(row.n_params),
        "flops": f"{row.flops_per_token / 1e6:,.1f}",
        "speed": f"{speed:,.0f}" if speed is not None else "–",
        "memory": f"{memory:.1f}" if memory is not None else "–",
    }
    if saved and saved.bound:
        texts["saved"] = ("≥ " if saved.fraction > 0 else "≤ ") + texts["saved"]
    if found and found.own_noise and found.half_width is not None:
        texts["interval"] += " (own)"
    if diverged:
        others = f", the others {texts['verdict']}" if texts["verdict"] else ""
        texts["verdict"] = f"{_count(diverged, 'seed')} diverged{others}"
    if not row.same_batches:
        texts["verdict"] += " (other batches)"
    return [texts[key] for _, key in HEAD]


def _noise_lines(result: StudyResult) -> list[str]:
    if result.seed_sigma is None:
        return ["One seed: there is no measure of noise, and no difference is claimed."]
    lines = [f"σ of the baseline's final loss over its seeds: {result.seed_sigma:.4f} nats."]
    lines += [
        f"σ of a run once row and seed are taken out, {KINDS[noise.kind]}: {noise.paired:.4f} "
        f"(df {noise.df}, {_count(len(noise.rows), 'row')})."
        for noise in result.noises
        if noise.paired is not None
    ]
    lines += [
        f"The baseline is noisier than its rows, {KINDS[noise.kind]}: each is judged by its own "
        "paired differences."
        for noise in result.noises
        if not noise.rows
    ]
    compared = sum(row.comparison is not None for row in result.rows)
    if compared > 1:
        lines.append(
            f"Verdicts hold for all {compared} comparisons together at 5 % (Holm) if rows of a "
            f"kind are about equally noisy, of which {_count(result.seeds, 'seed')} can tell "
            "little; each interval is for its row alone."
        )
    if any(row.comparison and row.comparison.own_noise for row in result.rows):
        lines.append(
            "(own): from the row's own paired differences, because it is noisier than its kind or "
            "because seeds are missing."
        )
    return lines


def _reading_lines(result: StudyResult) -> list[str]:
    lines = [
        "Differences are of the held-out loss at the end, row minus baseline, paired: a seed "
        "gives every row the same windows in the same order, by hash.",
        "tokens/s: the fastest seed's, whose fastest tenth of logged steps has this median, "
        "because what else the machine does, as other runs that compile, only slows; – where "
        "others trained on the device.",
    ]
    if (gap := _speed_gap(result)) is not None:
        lines.append(
            f"The two fastest seeds of a row differ by up to {100 * gap:.1f} % in tokens/s: a "
            "smaller difference between rows says little."
        )
    if len(result.provenance["device"]) > 1:
        lines.append("Runs are from several kinds of devices: tokens/s does not compare rows.")
    if stable_tokens(result.config):
        at = _amount(stable_tokens(result.config))
        lines.append(
            "tokens saved compares the two curves, mean of the seeds, where the learning rate is "
            f"still at its peak (to {at} tokens): how much earlier the better one meets the "
            "other's last loss there. It is not the same as the difference at the end, after the "
            "decay, which can even have the other sign, and has no interval: of a row within noise "
            "it is noise too."
        )
    else:
        lines.append(
            "tokens saved needs a phase of constant learning rate; this schedule has none."
        )
    return lines


def _speed_gap(result: StudyResult) -> float | None:
    """Of any row the most by which its second fastest seed is slower; None without two seeds."""
    gaps = []
    for row in result.rows:
        speeds = sorted(v for run in row.runs if (v := run.tokens_per_second) is not None)
        if len(speeds) > 1:
            gaps.append(1 - speeds[-2] / speeds[-1])
    return max(gaps, default=None)


def _amount(number: int) -> str:
    return f"{number / 1e6:,.2f}M" if number >= 1_000_000 else f"{number:,}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
