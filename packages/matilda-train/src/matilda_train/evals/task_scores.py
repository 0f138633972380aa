"""Scores of tasks read from local files, with the standard errors of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matilda_train.evals.encoding import TextCoder, encode_pairs
from matilda_train.evals.scoring import Pair, ScoredModel, Scores, score_pairs
from matilda_train.evals.task_files import TaskFile

__all__ = ["TaskScores", "judge", "judge_all", "plain_metrics", "score_tasks"]


@dataclass(frozen=True)
class TaskScores:
    """What a model did on one task, an entry an item."""

    name: str
    ids: tuple[str, ...]
    correct: NDArray[np.bool_]
    """The likeliest answer is the right one or, for a continuation, greedy decoding gives it."""
    correct_norm: NDArray[np.bool_] | None = None
    """The same by log-likelihood a character; only for choices."""
    loglikelihood: NDArray[np.float64] | None = None
    """Of the continuation, nats; only for continuations."""

    def without(self, ids: Collection[str], name: str) -> TaskScores:
        """The same without some items."""
        kept = np.array([each not in ids for each in self.ids], dtype=np.bool_)

        def left(values: Any) -> Any:
            return None if values is None else values[kept]

        return TaskScores(
            name,
            tuple(each for each in self.ids if each not in ids),
            left(self.correct),
            left(self.correct_norm),
            left(self.loglikelihood),
        )

    def metrics(self) -> dict[str, float]:
        """`acc` and, where the task has it, `acc_norm`, as fractions, or `perplexity`.

        Each has a standard error, `…_stderr`: that of a mean, from the sample's variance (n - 1).
        That of the perplexity follows from its logarithm's, where the harness draws at random.
        """
        out: dict[str, float] = {"items": len(self.correct)}
        out["acc"], out["acc_stderr"] = _mean(self.correct)
        if self.correct_norm is not None:
            out["acc_norm"], out["acc_norm_stderr"] = _mean(self.correct_norm)
        if self.loglikelihood is not None:
            mean, error = _mean(-self.loglikelihood)
            # The mean of something that may be infinite, or nearly so, in a broken model.
            out["perplexity"] = math.exp(mean) if mean < 700 else math.inf
            out["perplexity_stderr"] = out["perplexity"] * error
        return out


def score_tasks(
    model: ScoredModel,
    coder: TextCoder,
    tasks: Sequence[TaskFile],
    *,
    batch_tokens: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TaskScores]:
    """Score every item of `tasks`, all of them in one go; see `score_pairs`.

    Raises `ValueError` for what the model cannot be asked, such as a text that is too long.
    """
    pairs: list[Pair] = []
    for task in tasks:
        texts = [text for item in task.items for text in item.texts]
        pairs += encode_pairs(coder, texts)
    scores = score_pairs(model, pairs, batch_tokens=batch_tokens, on_progress=on_progress)
    return judge_all(tasks, scores)


def judge_all(tasks: Sequence[TaskFile], scores: Scores) -> list[TaskScores]:
    """`judge` for tasks whose scores follow one another."""
    found, first = [], 0
    for task in tasks:
        stop = first + sum(len(item.texts) for item in task.items)
        part = Scores(scores.loglikelihood[first:stop], scores.greedy[first:stop])
        found.append(judge(task, part))
        first = stop
    return found


def judge(task: TaskFile, scores: Scores) -> TaskScores:
    """Which items are right, from the scores of all their answers in order."""
    ids = tuple(item.id for item in task.items)
    if task.kind == "continuation":
        return TaskScores(task.name, ids, scores.greedy, loglikelihood=scores.loglikelihood)
    correct = np.zeros(len(ids), dtype=np.bool_)
    correct_norm = np.zeros(len(ids), dtype=np.bool_)
    first = 0
    for number, item in enumerate(task.items):
        values = scores.loglikelihood[first : first + len(item.texts)]
        first += len(item.texts)
        correct[number] = int(values.argmax()) == item.label
        correct_norm[number] = int((values / np.array(item.lengths)).argmax()) == item.label
    return TaskScores(task.name, ids, correct, correct_norm if task.kind == "choices" else None)


def plain_metrics(scores: TaskScores) -> dict[str, float | None]:
    """`TaskScores.metrics` for JSON: what is unknown or infinite is None."""
    return {
        name: value if math.isfinite(value) else None for name, value in scores.metrics().items()
    }


def _mean(values: NDArray[Any]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is unknown, NaN."""
    sample = values.astype(np.float64)
    if len(sample) < 2:
        return float(sample.mean()) if len(sample) else math.nan, math.nan
    return float(sample.mean()), float(sample.std(ddof=1) / math.sqrt(len(sample)))
