"""Tasks scored while a run trains, as part of its evaluations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from matilda_data import load_tokenizer
from matilda_model import Transformer
from matilda_train.cadence import Cadence
from matilda_train.config import RunConfig
from matilda_train.distributed import Ranks
from matilda_train.evals.encoding import DatasetCoder, encode_pairs
from matilda_train.evals.scoring import Pair, ScoredTransformer, Scores, score_pairs
from matilda_train.evals.task_files import read_tasks
from matilda_train.evals.task_scores import judge_all, plain_metrics

__all__ = ["IntervalTasks", "describe_scores"]


class _StopError(Exception):
    """The run was asked to stop in the middle."""


class IntervalTasks:
    """The tasks of `eval.tasks`, their answers encoded once; every rank scores a share of them.

    Nothing is drawn, and no weight or generator is touched. Raises `ValueError` for files that are
    missing or malformed and for items that the model cannot be asked.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        names, folder = config.eval.tasks, config.eval.task_dir or ""
        self._tasks = read_tasks(folder, names, limit=config.eval.task_limit) if names else []
        texts = [text for task in self._tasks for item in task.items for text in item.texts]
        self._pairs: list[Pair] = []
        if texts:
            coder = DatasetCoder(load_tokenizer(config.data.tokenizer))
            self._pairs = encode_pairs(coder, texts)
        longest = max((len(pair.continuation) for pair in self._pairs), default=0)
        if longest > config.model.max_seq_len:
            raise ValueError(
                f"`eval.tasks` has an answer of {longest} tokens, but `model.max_seq_len` is "
                f"{config.model.max_seq_len}; leave that task out."
            )
        interval = config.eval.tasks_interval
        self._cadence = Cadence(interval, config.plan, ranks.any) if interval else None
        self._ranks = ranks
        self._batch_tokens = config.micro_batch_size * config.seq_len  # which is known to fit
        self._eager = config.train.compile and ranks.world_size > 1

    def due(self, step: int, *, with_evaluation: bool, at_end: bool) -> bool:
        """Whether they are to be scored after `step` steps; asked once a step."""
        if not self._tasks or at_end:
            return bool(self._tasks)
        return with_evaluation if self._cadence is None else self._cadence.due(step)

    def score(
        self, model: Transformer, *, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """`task_scores` for a row of the metrics, {} without tasks; None if asked to stop.

        Every rank must call it. A rank of several is asked to stop before it begins only.
        """
        if not self._tasks:
            return {}
        if self._ranks.any(should_stop()):
            return None

        def look(done: int, total: int) -> None:
            if should_stop() and self._ranks.world_size == 1:
                raise _StopError

        own = slice(self._ranks.rank, None, self._ranks.world_size)
        # Compiled blocks are for the one shape of training.
        eager = torch.compiler.set_stance("force_eager") if self._eager else nullcontext()
        try:
            with eager:
                scores = score_pairs(
                    ScoredTransformer(model),
                    self._pairs[own],
                    batch_tokens=self._batch_tokens,
                    on_progress=look,
                )
        except _StopError:
            return None
        values = torch.zeros(2, len(self._pairs), dtype=torch.float64)
        values[0, own] = torch.from_numpy(scores.loglikelihood)
        values[1, own] = torch.from_numpy(scores.greedy.astype(np.float64))
        values = self._ranks.mean_(values) * self._ranks.world_size
        whole = Scores(values[0].numpy(), values[1].numpy() > 0.5)
        results = judge_all(self._tasks, whole)
        return {"task_scores": {result.name: plain_metrics(result) for result in results}}


def describe_scores(row: dict[str, Any]) -> str:
    """The accuracies in `task_scores`, to be said after other figures; empty without any."""
    scores = row.get("task_scores", {})
    return "".join(f", {name} {100 * each['acc']:.1f} %" for name, each in scores.items())
