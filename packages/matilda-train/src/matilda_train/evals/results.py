"""The results of an evaluation: as JSON, as a table, in the run that they are of."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matilda_train.evals.pythia import Comparison, compare_with, describe, footnotes
from matilda_train.metrics_log import MetricsLog
from matilda_train.report.section import describe_provenance, replace_section
from matilda_train.report.tables import markdown_table
from matilda_train.run_dir import RunDir, write_output

__all__ = [
    "FORMAT",
    "accuracies",
    "record_in_run",
    "scores_only",
    "table",
    "write_page",
    "write_results",
]

FORMAT = "matilda-evaluation/1"
MADE_WITH = ("git_sha", "uncommitted", "device", "torch", "cuda", "python", "data_id")
SCORE_NAMES = ("items", "acc", "acc_norm", "perplexity")


def write_results(results: Mapping[str, Any], path: Path) -> Path:
    """Write `results`, whole or not at all; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_output(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return path


def record_in_run(results: Mapping[str, Any], run_dir: Path) -> tuple[Path, str]:
    """Keep results in their run: the file, and why no row was added, if none was.

    `evals/step-XXXXXXXX.json` keeps other tasks that were scored at that step before.
    `metrics.jsonl` gets a row with `step`, `tokens` and `task_scores`, unless a process is training
    in the run.
    """
    path = run_dir / "evals" / f"step-{results['step']:08d}.json"
    before: dict[str, Any] = {}
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8")).get("tasks", {})
        except (ValueError, AttributeError):
            before = {}  # damaged: these results replace it
    kept = {**results, "tasks": {**before, **results["tasks"]}}
    if "comparisons" in kept and before:  # of all the tasks that are kept, then
        kept["comparisons"] = {
            model: compare_with(model, accuracies(kept["tasks"]), tokens=kept["tokens"]).to_dict()
            for model in kept["comparisons"]
        }
    write_results(kept, path)
    row = {name: results[name] for name in ("step", "tokens")}
    scores = {name: scores_only(task) for name, task in results["tasks"].items()}
    try:
        with RunDir.hold(run_dir):
            log = MetricsLog(run_dir / "metrics.jsonl", step=sys.maxsize)
            log.write({**row, "task_scores": scores})
            log.sync()
            log.close()
    except ValueError as error:
        return path, f"no row was added to its metrics: {error}"
    return path, ""


def write_page(
    results: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    page: str | Path,
    *,
    name: str,
    command: str,
) -> None:
    """Write the section `evaluation: NAME` of a Markdown page."""
    how = [f"zero-shot, scored in {results['dtype']}"]
    if results.get("tokens") is not None:
        how.append(
            f"{results['parameters'] / 1e6:.2f}M parameters, trained on "
            f"{results['tokens'] / 1e6:,.1f}M tokens"
        )
    how += [f"the first {results['limit']:,} items of each task"] if results["limit"] else []
    how += [f"by lm-evaluation-harness {results['harness']}"] if results["harness"] else []
    lines = [
        f"## {name}",
        "",
        f"{results['model']}: {'; '.join(how)}. One run: ± is the standard error over a task's "
        "items, not over seeds.",
        "",
        *markdown_table(table(results["tasks"])),
    ]
    if "contamination" in results:
        found = results["contamination"]
        searched = f"{found['searched']['documents']:,} documents"
        data_id = found["searched"].get("data_id")
        searched += f" of data set {data_id[:12]}" if data_id else ""
        lines += [
            "",
            f"In training text: {found['rule']}, of the items that have as many in a field; looked "
            f"for in {searched}.",
        ]
    for comparison in comparisons:
        lines += ["", *describe(comparison, markdown=True)]
    lines += ["", *(f"- {note}" for note in footnotes())] if comparisons else []
    made_with = {key: [results.get(key)] for key in MADE_WITH} | {"dates": [results["date"]]}
    lines += ["", "Made by", "", "<!-- needs: files -->", "```sh", command, "```", ""]
    lines.append(f"with {describe_provenance(made_with)}.")
    replace_section(page, f"evaluation: {name}", "\n".join(lines), title="Results")


def accuracies(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, int]]:
    """(accuracy, items) of each task that has one, as `compare_with` takes them."""
    return {
        name: (task["acc"], int(task["items"]))
        for name, task in tasks.items()
        if task.get("acc") is not None
    }


def scores_only(task: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a task's results, without what they were made of."""
    names = {name for base in SCORE_NAMES for name in (base, f"{base}_stderr")}
    return {name: value for name, value in task.items() if name in names}


def table(tasks: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Heads, and a row a task: scores in percent with standard errors, and contaminated items."""
    heads = ["task", "items", "acc", "acc_norm", "perplexity", "in training text"]
    rows = [
        [
            name,
            f"{task['items']:,.0f}",
            _percent(task, "acc"),
            _percent(task, "acc_norm"),
            _plain(task, "perplexity"),
            _contaminated(task),
        ]
        for name, task in tasks.items()
    ]
    used = [i for i in range(len(heads)) if i < 3 or any(row[i] for row in rows)]
    return [[row[i] for i in used] for row in [heads, *rows]]


def _contaminated(task: Mapping[str, Any]) -> str:
    """Of those items that are long enough to be found."""
    if task.get("contaminated") is None:
        return ""
    if "too_short" not in task:
        return f"{task['contaminated']:,} items"
    return f"{task['contaminated']:,} of {task['items'] - task['too_short']:,.0f}"


def _percent(task: Mapping[str, Any], name: str) -> str:
    value, error = task.get(name), task.get(f"{name}_stderr")
    if value is None:
        return ""
    return f"{100 * value:.2f} ± {100 * error:.2f}" if error is not None else f"{100 * value:.2f}"


def _plain(task: Mapping[str, Any], name: str) -> str:
    value, error = task.get(name), task.get(f"{name}_stderr")
    if name not in task:
        return ""
    if value is None or not math.isfinite(value):
        return "∞"
    return f"{value:,.2f} ± {error:,.2f}" if error is not None else f"{value:,.2f}"
