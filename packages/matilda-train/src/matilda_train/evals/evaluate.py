"""From the names of tasks to results of a model on them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from matilda_train.console import Display, SilentDisplay
from matilda_train.evals import pythia
from matilda_train.evals.contamination import Overlap, add_clean_scores, read_overlap
from matilda_train.evals.harness import evaluate_harness, require_harness
from matilda_train.evals.results import FORMAT, accuracies
from matilda_train.evals.subject import Subject
from matilda_train.evals.task_files import TaskFile, read_tasks
from matilda_train.evals.task_scores import TaskScores, plain_metrics, score_tasks
from matilda_train.provenance import collect_provenance, package_version

__all__ = ["evaluate_tasks"]


def evaluate_tasks(
    subject: Subject,
    names: Sequence[str],
    *,
    task_dir: Path | None = None,
    limit: int | None = None,
    compare: Sequence[str] = (),
    contamination: Path | None = None,
    batch_tokens: int | None = None,
    display: Display | None = None,
) -> tuple[dict[str, Any], list[pythia.Comparison]]:
    """Results as plain JSON: `tasks`, by name, with what they were measured on and how.

    Tasks are files of `task_dir` or, without it, the harness' own. `compare` names Pythias to set a
    run beside; what comes of it is in the results too. With `contamination` (of `matilda-data
    overlap --json`), each task also says how many of its items are `contaminated`, and `TASK_clean`
    leaves those out.

    Raises `ValueError` for whatever the user can mend, `OSError` where the harness cannot get a
    task's data.
    """
    display = display or SilentDisplay()
    overlap, files = check_request(subject, names, task_dir, limit, compare, contamination)
    batch_tokens = batch_tokens or subject.batch_tokens
    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        if done == 0:
            display.begin("evaluating", total=total)
        display.advance(done, f"{done:,} of {total:,} tokens")

    if files:
        scores = score_tasks(
            subject.model, subject.coder, files, batch_tokens=batch_tokens, on_progress=progress
        )
        tasks = _local_results(files, scores, overlap, limited=limit is not None)
    else:
        from matilda_train.evals.harness_model import HarnessModel

        adapted = HarnessModel(
            subject.model, subject.coder, batch_tokens=batch_tokens, on_progress=progress
        )
        tasks = evaluate_harness(adapted, names, limit=limit)
    results: dict[str, Any] = {
        "format": FORMAT,
        "model": subject.name,
        **(subject.origin or {}),
        "dtype": subject.dtype,
        **_made_with(subject.model.device),
        "seconds": round(time.monotonic() - began, 3),
        "limit": limit,
        "harness": None if files else package_version("lm_eval"),
        "tasks": tasks,
    }
    if overlap is not None:
        results["contamination"] = {"rule": overlap.rule, "searched": overlap.searched}
    comparisons = [
        pythia.compare_with(model, accuracies(tasks), tokens=results["tokens"]) for model in compare
    ]
    if comparisons:
        results["comparisons"] = {each.model: each.to_dict() for each in comparisons}
    return results, comparisons


def _made_with(device: torch.device) -> dict[str, Any]:
    """What these scores were computed with, and when."""
    found = collect_provenance(device)
    return {
        **{name: found[name] for name in ("git_sha", "device", "cuda", "python")},
        "uncommitted": bool(found["git_diff_sha256"]),
        "torch": str(torch.__version__),
        "date": datetime.now(UTC).date().isoformat(),
    }


def check_request(
    subject: Subject,
    names: Sequence[str],
    task_dir: Path | None,
    limit: int | None,
    compare: Sequence[str],
    contamination: Path | None,
) -> tuple[Overlap | None, list[TaskFile]]:
    """Everything that can be wrong with a request, before the model works for minutes."""
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`--tasks` must name tasks, each once, not {','.join(names)!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`--limit` must be 1 or more, not {limit}.")
    if compare and subject.origin is None:
        raise ValueError("`--compare` sets a run beside Pythia: give `--run` or `--checkpoint`.")
    for model in compare:
        pythia.pythia_curves(model)
    if task_dir is None:
        require_harness()
        if contamination is not None:
            raise ValueError("`--contamination` needs the task files it is about: `--task-dir`.")
        return None, []
    files = read_tasks(task_dir, names, limit=limit)
    if contamination is None:
        return None, files
    overlap = read_overlap(contamination)
    for file in files:
        overlap.ids(file)
    searched, trained = overlap.searched.get("data_id"), (subject.origin or {}).get("data_id")
    if searched and trained and searched != trained:
        raise ValueError(
            f"The overlap {str(contamination)!r} was measured in data set {searched[:12]}, but the "
            f"model was trained on {trained[:12]}; measure it again with `matilda-data overlap`."
        )
    return overlap, files


def _local_results(
    files: Sequence[TaskFile],
    scores: Sequence[TaskScores],
    overlap: Overlap | None,
    *,
    limited: bool,
) -> dict[str, dict[str, Any]]:
    """By task: its metrics, its file, and which items were right, in order, as 0s and 1s."""
    by_name = {file.name: file for file in files}
    shown = scores if overlap is None else add_clean_scores(files, scores, overlap)
    tasks: dict[str, dict[str, Any]] = {}
    for score in shown:
        file = by_name.get(score.name) or by_name[score.name.removesuffix(pythia.CLEAN)]
        tasks[score.name] = {
            **plain_metrics(score),
            "file": file.path.name,
            "sha256": file.sha256,
            "correct": "".join("01"[int(right)] for right in score.correct),
        }
        found = None if overlap is None or score.name not in by_name else overlap.ids(file)
        if found is not None:
            assert overlap is not None
            tasks[score.name]["contaminated"] = len(set(found) & set(score.ids))
            if not limited and file.sha256 in overlap.too_short:
                tasks[score.name]["too_short"] = overlap.too_short[file.sha256]
    return tasks
