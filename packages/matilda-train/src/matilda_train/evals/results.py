"""The results of an evaluation: as JSON, as a table, in the run that they are of."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matilda_train.metrics_log import MetricsLog
from matilda_train.run_dir import RunDir, write_durably

__all__ = ["FORMAT", "record_in_run", "scores_only", "table", "write_results"]

FORMAT = "matilda-evaluation/1"
SCORE_NAMES = ("items", "acc", "acc_norm", "perplexity")


def write_results(results: Mapping[str, Any], path: Path) -> Path:
    """Write `results`, whole or not at all; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
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
    write_results({**results, "tasks": {**before, **results["tasks"]}}, path)
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


def scores_only(task: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a task's results, without what they were made of."""
    names = {name for base in SCORE_NAMES for name in (base, f"{base}_stderr")}
    return {name: value for name, value in task.items() if name in names}


def table(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each task: scores in percent with standard errors, and contaminated items."""
    heads = ["task", "items", "acc", "acc_norm", "perplexity", "in training text"]
    rows = [
        [
            name,
            f"{task['items']:,.0f}",
            _percent(task, "acc"),
            _percent(task, "acc_norm"),
            _plain(task, "perplexity"),
            "" if task.get("contaminated") is None else f"{task['contaminated']:,} items",
        ]
        for name, task in tasks.items()
    ]
    used = [i for i in range(len(heads)) if i < 3 or any(row[i] for row in rows)]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in used]
    return [
        "  ".join(
            row[i].ljust(width) if i == 0 else row[i].rjust(width)
            for i, width in zip(used, widths, strict=True)
        ).rstrip()
        for row in [heads, *rows]
    ]


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
