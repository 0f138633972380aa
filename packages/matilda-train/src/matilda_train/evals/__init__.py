"""Evaluation on question sets: likelihoods, tasks, the harness, and Pythia to compare with.

Names load on first use; none of them needs the harness but those that say so.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matilda_train.evals.encoding import DatasetCoder, TextCoder, encode_pairs
    from matilda_train.evals.evaluate import evaluate_tasks
    from matilda_train.evals.harness import evaluate_harness, harness_task
    from matilda_train.evals.harness_model import HarnessModel
    from matilda_train.evals.pythia import Comparison, compare_with, pythia_curves
    from matilda_train.evals.scoring import (
        Pair,
        ScoredModel,
        ScoredTransformer,
        Scores,
        rolling_pairs,
        score_pairs,
    )
    from matilda_train.evals.subject import Subject, open_checkpoint, open_folder, open_run
    from matilda_train.evals.task_files import TaskFile, TaskItem, read_tasks
    from matilda_train.evals.task_scores import TaskScores, score_tasks
    from matilda_train.evals.transformers_folder import load_folder

__all__ = [
    "Comparison",
    "DatasetCoder",
    "HarnessModel",
    "Pair",
    "ScoredModel",
    "ScoredTransformer",
    "Scores",
    "Subject",
    "TaskFile",
    "TaskItem",
    "TaskScores",
    "TextCoder",
    "compare_with",
    "encode_pairs",
    "evaluate_harness",
    "evaluate_tasks",
    "harness_task",
    "load_folder",
    "open_checkpoint",
    "open_folder",
    "open_run",
    "pythia_curves",
    "read_tasks",
    "rolling_pairs",
    "score_pairs",
    "score_tasks",
]

_HOME = {
    "encoding": ("DatasetCoder", "TextCoder", "encode_pairs"),
    "evaluate": ("evaluate_tasks",),
    "harness": ("evaluate_harness", "harness_task"),
    "harness_model": ("HarnessModel",),
    "pythia": ("Comparison", "compare_with", "pythia_curves"),
    "scoring": (
        "Pair",
        "ScoredModel",
        "ScoredTransformer",
        "Scores",
        "rolling_pairs",
        "score_pairs",
    ),
    "subject": ("Subject", "open_checkpoint", "open_folder", "open_run"),
    "task_files": ("TaskFile", "TaskItem", "read_tasks"),
    "task_scores": ("TaskScores", "score_tasks"),
    "transformers_folder": ("load_folder",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
