"""Tasks by lm-evaluation-harness: those of its own catalogue, and local files as such tasks."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from typing import Any

from matilda_train.evals.task_files import TaskFile

__all__ = ["evaluate_harness", "harness_task", "require_harness"]

BOOTSTRAP_DRAWS = 1000  # for the standard errors that have no formula
FEWSHOT_SEED = 1234  # the harness' own default


def require_harness() -> None:
    """Raise `ValueError` when the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "Tasks without `--task-dir` are run by lm-evaluation-harness, which is not installed; "
            "add it with `uv run --extra eval …` or `pip install 'matilda-train[eval]'`, or give a "
            "folder of task files."
        )


def evaluate_harness(
    model: Any, tasks: Sequence[Any], *, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Metrics of each task by name, from a `HarnessModel` or any other model of the harness.

    `tasks` are names of the catalogue or tasks made by `harness_task`. Metrics are named as ours
    (`acc`, `acc_stderr`, …, `items`); `task_version` is the harness'. Raises `ValueError` for a
    task that the harness does not know, `OSError` for one whose data cannot be had.
    """
    require_harness()
    import lm_eval

    named = [task for task in tasks if isinstance(task, str)]
    found = _load_by_name(named) if named else {"tasks": {}, "groups": {}, "group_map": {}}
    found["tasks"] |= {task.config.task: task for task in tasks if not isinstance(task, str)}
    results = lm_eval.evaluate(
        model, found, limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAP_DRAWS
    )
    return {
        name: _own_names(row)
        | {
            "items": float(results["n-samples"][name]["effective"]),
            "task_version": results["versions"].get(name),
        }
        for name, row in results["results"].items()
        if name in results["n-samples"]
    }


def _load_by_name(names: Sequence[str]) -> Any:
    """What the harness evaluates for these tasks and groups of its catalogue."""
    from lm_eval.tasks import TaskManager

    catalogue = TaskManager()
    unknown = [name for name in names if not catalogue.match_tasks([name])]
    if unknown:
        close = difflib.get_close_matches(unknown[0], catalogue.all_tasks, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"The harness has no task {unknown[0]!r}{hint}; see `lm_eval ls tasks`.")
    try:
        loaded = catalogue.load(list(names))
    except OSError as error:
        raise OSError(  # the environment failed, not the user
            f"The data of {', '.join(names)} cannot be loaded ({error}); check the network, or "
            "give a folder of task files with `--task-dir`."
        ) from error
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def _own_names(row: dict[str, Any]) -> dict[str, float]:
    """`acc,none` and `acc_stderr,none` without the filter's name."""
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return {name.partition(",")[0]: float(v) for name, v in numbers.items() if "," in name}


def harness_task(task: TaskFile) -> Any:
    """A local file as a `ConfigurableTask`: the harness' own requests, metrics and aggregation."""
    require_harness()
    import datasets
    from lm_eval.api.task import ConfigurableTask

    docs = [
        {
            "contexts": [context for context, _ in item.texts],
            "answers": [answer for _, answer in item.texts],
            "label": item.label,
        }
        for item in task.items
    ]
    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)},
        "test_split": "test",
        "num_fewshot": 0,
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": task.sha256[:12]},
    }
    if task.kind == "continuation":
        config["output_type"] = "loglikelihood"
        config["doc_to_text"] = lambda doc: doc["contexts"][0]
        config["doc_to_target"] = lambda doc: doc["answers"][0]
        config["metric_list"].append(
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        )
    elif task.kind == "contexts":
        config["doc_to_text"] = lambda doc: doc["label"]
        config["doc_to_choice"] = lambda doc: doc["contexts"]
        config["doc_to_target"] = lambda doc: doc["answers"][0][1:]
    else:
        config["doc_to_text"] = lambda doc: doc["contexts"][0]
        config["doc_to_choice"] = lambda doc: [answer[1:] for answer in doc["answers"]]
        config["doc_to_target"] = lambda doc: doc["label"]
        config["metric_list"].append(
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
        )
    return ConfigurableTask(config=config)
