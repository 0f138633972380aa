"""The HTML file of a report: tables made here, plots by the plotly.js that it carries along."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from matilda_train.config_load import flatten_sections
from matilda_train.report.run_record import RunRecord, name_runs, read_run
from matilda_train.run_dir import check_output, write_output
from matilda_train.time_account import BUCKETS, format_seconds

__all__ = ["plotly_source", "write_report"]

Cell = tuple[str, str]


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of these run directories to `out`, whole or not at all.

    Equal runs give equal bytes. Raises `ValueError` for a directory that holds no run, for an `out`
    that cannot be a file, and when plotly is not installed.
    """
    if not runs:
        raise ValueError("A report needs at least one run directory.")
    script = plotly_source()
    paths = [Path(run) for run in runs]
    records = [read_run(path, name) for path, name in zip(paths, name_runs(paths), strict=True)]
    out = Path(out)
    check_output(out, "--out")
    write_output(out, render(records, script))
    return out


def plotly_source() -> str:
    """plotly.js from the installed `plotly` package."""
    spec = importlib.util.find_spec("plotly")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "package_data" / "plotly.min.js"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise ValueError(
        "The report's plots need plotly, which is not installed; install it with `pip install "
        "'matilda-train[report]'`."
    )


def render(records: Sequence[RunRecord], plotly: str) -> str:
    """The whole page."""
    parts = {
        "title": escape(", ".join(record.name for record in records)),
        "summary": _summary(records),
        "account": _account(records),
        "samples": _samples(records),
        "configs": _configs(records),
        "style": _asset("page.css"),
        "plotly": plotly,
        "data": _json([_drawn(record) for record in records]),
        "script": _asset("page.js"),
    }
    page = _asset("page.html")
    head, *rest = page.split("{{")
    filled = [head]
    for piece in rest:
        name, _, text = piece.partition("}}")
        filled += [parts[name], text]
    return "".join(filled)


def _drawn(record: RunRecord) -> dict[str, Any]:
    """What the page's script draws of a run."""
    return {
        "name": record.name,
        "steps": record.columns(),
        "evaluations": record.evaluation_columns(),
        "marks": record.marks,
        "account": {
            "wall": round(record.goodput.wall_seconds, 3),
            "seconds": {k: round(v, 3) for k, v in record.goodput.seconds.items() if v > 0},
        },
    }


def _json(value: Any) -> str:
    # `<` would let a run's name end the script element.
    return json.dumps(value, separators=(",", ":"), sort_keys=True).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (resources.files("matilda_train.report") / name).read_text(encoding="utf-8")


def _facts(record: RunRecord, *, alone: bool) -> list[Cell]:
    """The summary of a run, as (what, value)."""
    last = record.steps[-1] if record.steps else {}
    best = record.best_evaluation
    config = record.description["config"].get("train", {})
    return [
        ("status", record.status),
        ("parameters", _count(record.params)),
        ("steps", f"{last.get('step', 0):,} of {config.get('total_steps', 0):,}"),
        ("tokens", _count(last.get("tokens"))),
        ("last loss", _figure(last.get("loss_nats"), "{:.4f} nats")),
        (
            f"best held-out, step {best['step']:,}" if best and alone else "best held-out",
            f"{best['val_bits_per_byte']:.4f} bits/byte" if best else "–",
        ),
        ("tokens/s", _figure(record.median("tokens_per_second"), "{:,.0f}")),
        ("MFU (causal)", _figure(record.median("mfu_causal"), "{:.1%}")),
        ("goodput", _figure(record.goodput.fraction, "{:.1%}")),
        ("wall-clock", format_seconds(record.goodput.wall_seconds)),
        ("restarts", str(record.goodput.restarts)),
        ("peak memory", _figure(last.get("peak_memory_gib"), "{:.1f} GiB")),
        ("device", str(record.description.get("device") or "–")),
    ]


def _summary(records: Sequence[RunRecord]) -> str:
    """Tiles for one run, a table for several."""
    alone = len(records) == 1
    rows = [_facts(record, alone=alone) for record in records]
    # What no run has, such as a CPU's utilisation, is not worth a column.
    rows = [list(row) for row in zip(*_with_values(zip(*rows, strict=True)), strict=True)]
    if alone:
        tiles = (
            f"<div class=tile><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>"
            for what, value in rows[0]
        )
        return f"<dl class=tiles>{''.join(tiles)}</dl>"
    body = [
        [_run_name(index, record.name), *(escape(value) for _, value in row)]
        for index, (record, row) in enumerate(zip(records, rows, strict=True))
    ]
    return _table(["run", *(what for what, _ in rows[0])], body, css="summary")


def _with_values(columns: Iterable[tuple[Cell, ...]]) -> list[tuple[Cell, ...]]:
    """The columns in which some run has a value."""
    return [column for column in columns if any(value != "–" for _, value in column)]


def _account(records: Sequence[RunRecord]) -> str:
    """Where the time of each run went."""
    used = [name for name in BUCKETS if any(r.goodput.seconds[name] >= 0.05 for r in records)]
    body = []
    for name in used:
        cells = [f"<i class='key bucket-{list(BUCKETS).index(name)}'></i>{escape(name)}"]
        for record in records:
            seconds, wall = record.goodput.seconds[name], record.goodput.wall_seconds
            share = f" <b>{seconds / wall:.1%}</b>" if wall > 0 else ""
            cells.append(f"{format_seconds(seconds)}{share}" if seconds >= 0.05 else "–")
        body.append([*cells, escape(BUCKETS[name])])
    if not body:
        return "<p class=quiet>No time is accounted for yet.</p>"
    heads = ["", *(_run_name(i, r.name) for i, r in enumerate(records)), ""]
    return _table(heads, body, css="account", escaped=True)


def _samples(records: Sequence[RunRecord]) -> str:
    found = []
    for index, record in enumerate(records):
        for step, text in sorted(record.samples.items(), reverse=True):
            found.append(
                f"<figure><figcaption>{_run_name(index, record.name)} at step {step:,}"
                f"</figcaption><pre>{escape(text)}</pre></figure>"
            )
    return "".join(found) or "<p class=quiet>None yet: a run writes one when it ends.</p>"


def _configs(records: Sequence[RunRecord]) -> str:
    """What differs between the runs; then each run's whole config and origin, folded away."""
    configs = [flatten_sections(record.description["config"]) for record in records]
    names = sorted({name for config in configs for name in config})
    parts = []
    if len(records) > 1:
        body = [
            [f"<code>{escape(name)}</code>", *(_code(config.get(name)) for config in configs)]
            for name in names
            if len({json.dumps(config.get(name)) for config in configs}) > 1
        ]
        heads = ["field", *(_run_name(i, r.name) for i, r in enumerate(records))]
        parts.append(
            _table(heads, body, css="diff", escaped=True)
            if body
            else "<p class=quiet>The configs are equal.</p>"
        )
    for index, record in enumerate(records):
        whole = [[f"<code>{escape(n)}</code>", _code(configs[index].get(n))] for n in names]
        origin = {k: v for k, v in record.description.items() if k != "config"}
        listed = [
            [f"<code>{escape(n)}</code>", _code(v)] for n, v in sorted(_spread(origin).items())
        ]
        parts.append(
            f"<details><summary>{_run_name(index, record.name)}: config and origin</summary>"
            f"<div class=pair>{_table(['field', 'value'], whole, css='diff')}"
            f"{_table(['origin', 'value'], listed, css='diff')}</div></details>"
        )
    return "".join(parts)


def _spread(origin: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in origin.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _table(
    heads: Sequence[str], body: Iterable[Sequence[str]], *, css: str, escaped: bool = False
) -> str:
    top = "".join(f"<th>{head if escaped or '<' in head else escape(head)}</th>" for head in heads)
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return (
        f"<div class=scroll><table class={css}><thead><tr>{top}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _run_name(index: int, name: str) -> str:
    return f"<span class=run><i class='key run-{index % 8}'></i>{escape(name)}</span>"


def _code(value: Any) -> str:
    return f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>"


def _figure(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)


def _count(value: float | None) -> str:
    """A number with four digits at most."""
    if value is None:
        return "–"
    for size, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / (1e3 if suffix == ' k' else size):.4g}{suffix}"
    return f"{value:,.0f}"
