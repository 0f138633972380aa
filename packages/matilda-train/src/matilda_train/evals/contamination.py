"""What `matilda-data overlap` found of evaluation sets in training text, beside their scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matilda_train.evals.pythia import CLEAN
from matilda_train.evals.task_files import TaskFile
from matilda_train.evals.task_scores import TaskScores

__all__ = ["Overlap", "add_clean_scores", "read_overlap"]

FORMAT = "matilda-overlap/1"


@dataclass(frozen=True)
class Overlap:
    """Items of task files that share a run of words with training text."""

    searched: dict[str, Any]
    """What was looked through: `data_id` and `split`, or `inputs`; and `documents`."""
    rule: str
    found: dict[str, tuple[str, ...]]
    """Ids of the items found, by SHA-256 of the file that they are in."""
    files: dict[str, str]
    """SHA-256 of each file, by its name."""
    too_short: dict[str, int]
    """How many items are too short to be found, by SHA-256 of the file."""

    def ids(self, task: TaskFile) -> tuple[str, ...] | None:
        """The task's items that were found, None if its file was not looked for.

        Raises `ValueError` when a file of that name was looked for, but of other content.
        """
        if task.sha256 not in self.found and task.path.name in self.files:
            raise ValueError(
                f"The overlap was measured on another {task.path.name!r} than {str(task.path)!r}; "
                "measure it again with `matilda-data overlap`."
            )
        return self.found.get(task.sha256)


def read_overlap(path: str | Path) -> Overlap:
    """The result of `matilda-data overlap --json`; `ValueError` when `path` holds none."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        if report["format"] != FORMAT:
            raise KeyError("format")
        files = report["files"]
        return Overlap(
            searched=report["searched"],
            rule=report["rule"],
            found={file["sha256"]: tuple(file["ids"]) for file in files},
            files={file["name"]: file["sha256"] for file in files},
            too_short={
                file["sha256"]: file["items_too_short"]
                for file in files
                if "items_too_short" in file  # of no file that an older version wrote
            },
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no result of `matilda-data overlap --json` ({error!r})."
        ) from None


def add_clean_scores(
    tasks: Sequence[TaskFile], scores: Sequence[TaskScores], overlap: Overlap
) -> list[TaskScores]:
    """`scores`, each followed by those without the items found, as `TASK_clean`, if there are any.

    With a limit, only items among those scored count.
    """
    out: list[TaskScores] = []
    for task, score in zip(tasks, scores, strict=True):
        out.append(score)
        found = set(overlap.ids(task) or ()) & set(score.ids)
        if found and len(found) < len(score.ids):
            out.append(score.without(found, score.name + CLEAN))
    return out
