"""A model as lm-evaluation-harness sees it; to make one needs `matilda-train[eval]`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from matilda_model import generate
from matilda_train.evals.encoding import TextCoder, encode_pairs
from matilda_train.evals.harness import require_harness
from matilda_train.evals.scoring import (
    Pair,
    ScoredModel,
    ScoredTransformer,
    rolling_pairs,
    score_pairs,
)

try:
    from lm_eval.api.model import TemplateLM
except ImportError:  # the module imports without the extra, its model says what is missing
    TemplateLM = object

__all__ = ["HarnessModel"]

GENERATED_TOKENS = 256  # where a task names no number, as in the harness' own models
GENERATED_ROWS = 64


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness is an extra, untyped here
    """For `lm_eval.simple_evaluate(model=HarnessModel(…), tasks=[…])`.

    Tokens, truncation and likelihoods are those of the harness' `hf` model on the same weights;
    `generate_until` needs a model of ours. `on_progress(done, total)` hears of tokens scored.
    Raises `ValueError` when the harness is not installed.
    """

    def __init__(
        self,
        model: ScoredModel,
        coder: TextCoder,
        *,
        batch_tokens: int | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        require_harness()
        super().__init__()
        self._device = model.device
        self._model = model
        self._coder = coder
        self._batch_tokens = batch_tokens
        self._on_progress = on_progress

    @property
    def eot_token_id(self) -> int:
        return self._coder.eot_id

    @property
    def max_length(self) -> int:
        return self._model.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return "matilda"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self._coder.encode([string])[0]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        texts = [request.args for request in requests]
        answers = self._score(encode_pairs(self._coder, texts))
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score([Pair(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [request.args[0] for request in requests]
        windows = [
            rolling_pairs(ids, self.prefix_token_id, self.max_length)
            for ids in self._coder.encode(texts)
        ]
        answers = iter(self._score([pair for pairs in windows for pair in pairs]))
        totals = [sum(next(answers)[0] for _ in pairs) for pairs in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop text, greedy unless a task asks to sample.

        Sampling draws each answer from a generator of its own, seeded by the request and by how
        often it came before: neither the other requests nor their order changes an answer.
        """
        if not isinstance(self._model, ScoredTransformer):
            raise ValueError(
                "Tasks that generate text need a run or checkpoint of ours; for other models use "
                "the harness itself: `lm_eval --model hf`."
            )
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        seen: Counter[tuple[str, str]] = Counter()
        seeds = []
        for index, request in enumerate(requests):
            options = repr(sorted(request.args[1].items()))
            groups.setdefault(options, []).append(index)
            asked = (request.args[0], options)
            digest = hashlib.sha256(repr((*asked, seen[asked])).encode()).digest()
            seeds.append(int.from_bytes(digest[:8]) >> 1)
            seen[asked] += 1
        for members in groups.values():
            ids = self._coder.encode([requests[index].args[0] for index in members])
            prompts = dict(zip(members, ids, strict=True))
            members.sort(key=lambda index: len(prompts[index]))
            for first in range(0, len(members), GENERATED_ROWS):
                rows = members[first : first + GENERATED_ROWS]
                texts = self._generate(
                    self._model,
                    [prompts[index] for index in rows],
                    dict(requests[rows[0]].args[1]),
                    [seeds[index] for index in rows],
                )
                for index, text in zip(rows, texts, strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def _generate(
        self,
        model: ScoredTransformer,
        prompts: list[list[int]],
        options: dict[str, Any],
        seeds: list[int],
    ) -> list[str]:
        """One text a prompt and seed; `options` are the harness' `gen_kwargs`, which they share."""
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        n_new = next(
            (
                int(options[name])
                for name in ("max_gen_toks", "max_new_tokens", "max_tokens")
                if options.get(name) is not None
            ),
            GENERATED_TOKENS,
        )
        n_new = min(n_new, self.max_length - 1)
        kept = self.max_length - n_new
        temperature = float(options.get("temperature") or 0.0)
        if options.get("do_sample") is False:
            temperature = 0.0
        elif options.get("do_sample") and "temperature" not in options:
            temperature = 1.0
        longest = max((len(stop) for stop in stops), default=0)

        def stopped(ids: Sequence[int]) -> bool:
            # The newest token may have ended a stop text; each token has a byte or more.
            tail = self._coder.decode(ids[-4 * longest - 4 :])
            return any(stop in tail for stop in stops)

        rows = generate(
            model.model,
            [(prompt or [self.eot_token_id])[-kept:] for prompt in prompts],
            max_new_tokens=n_new,
            temperature=temperature,
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
            stop_ids=(self.eot_token_id,),
            stop_when=stopped if stops else None,
            vocab_limit=self._coder.vocab_size,
            generator=[torch.Generator(device=self._device).manual_seed(seed) for seed in seeds],
        )
        texts = []
        for row in rows:
            text = self._coder.decode(row)
            for stop in stops:
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        scores = score_pairs(
            self._model, pairs, batch_tokens=self._batch_tokens, on_progress=self._on_progress
        )
        return list(zip(scores.loglikelihood.tolist(), scores.greedy.tolist(), strict=True))
