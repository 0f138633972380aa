"""Sampling with a KV cache.

Shape suffixes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast, overload

import torch
from torch import Tensor

from matilda_model.cache import KVCache
from matilda_model.model import Transformer


@overload
def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    stop_when: Callable[[Sequence[int]], bool] | None = None,
    generator: torch.Generator | None = None,
    vocab_limit: int | None = None,
) -> list[int]: ...


@overload
def generate(
    model: Transformer,
    prompt_ids: Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    stop_when: Callable[[Sequence[int]], bool] | None = None,
    generator: torch.Generator | None = None,
    vocab_limit: int | None = None,
) -> list[list[int]]: ...


def generate(
    model: Transformer,
    prompt_ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    stop_when: Callable[[Sequence[int]], bool] | None = None,
    generator: torch.Generator | None = None,
    vocab_limit: int | None = None,
) -> list[int] | list[list[int]]:
    """Continue one prompt (a list of ids) or several (a list of lists, or a tensor [B, T]).

    Returns the new ids only, without the prompt and without the stop id that ended a row: a list
    for one prompt, a list of lists for several. Prompts may have unequal lengths.

    `temperature` 0 takes the likeliest token; `top_k` and `top_p` (nucleus, Holtzman et al. 2020)
    restrict the draw; `vocab_limit` is the tokenizer's true size, ids at or above it (padding rows
    of the embedding) are never produced. `stop_when` is asked with a row's new ids after each one
    and ends the row, which keeps it, when true. `generator` must live on the model's device; None
    uses torch's default one. Raises ValueError for values out of range and when prompt plus
    `max_new_tokens` exceed the model's `max_seq_len`.
    """
    prompts, single = _as_prompts(prompt_ids)
    rows: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for step, _ in _steps(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=stop_ids,
        generator=generator,
        vocab_limit=vocab_limit,
    ):
        for index, token in enumerate(step):
            if token is None or ended[index]:
                ended[index] = True
                continue
            rows[index].append(token)
            ended[index] = stop_when is not None and stop_when(rows[index])
        if all(ended):
            break
    return rows[0] if single else rows


def stream_tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
    vocab_limit: int | None = None,
) -> Iterator[int]:
    """As `generate` for one prompt, yielding each id as soon as it is drawn."""
    for step, _ in _steps(
        model,
        [_one_prompt(prompt_ids)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=stop_ids,
        generator=generator,
        vocab_limit=vocab_limit,
    ):
        if step[0] is not None:
            yield step[0]


@dataclass(frozen=True)
class Choice:
    """A drawn token beside what else it might have been."""

    token: int
    probability: float
    """The model's own: of softmax(logits), whatever temperature and restrictions the draw had."""
    candidates: tuple[tuple[int, float], ...]
    """The likeliest ids and their probabilities, likeliest first."""


def stream_choices(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    candidates: int = 10,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
    vocab_limit: int | None = None,
) -> Iterator[Choice]:
    """As `stream_tokens`, with the probabilities of the `candidates` likeliest ids at a place."""
    if candidates < 0:
        raise ValueError(f"`candidates` must be at least 0, not {candidates!r}")
    for step, logits_BV in _steps(
        model,
        [_one_prompt(prompt_ids)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=stop_ids,
        generator=generator,
        vocab_limit=vocab_limit,
    ):
        token = step[0]
        if token is not None:
            probs_V = logits_BV[0].float().softmax(dim=-1)
            top = probs_V.topk(min(candidates, len(probs_V)))
            likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            yield Choice(token, float(probs_V[token]), tuple(likeliest))


def _one_prompt(prompt_ids: Sequence[int]) -> list[int]:
    prompts, single = _as_prompts(prompt_ids)
    if not single:
        raise ValueError("`prompt_ids` must be one prompt to stream: use `generate` for several")
    return prompts[0]


def _as_prompts(
    prompt_ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
) -> tuple[list[list[int]], bool]:
    values = prompt_ids.tolist() if isinstance(prompt_ids, Tensor) else prompt_ids
    single = not any(isinstance(value, Sequence) for value in values)
    rows = cast("list[Sequence[int]]", [values] if single else values)
    if any(len(row) == 0 for row in rows):
        raise ValueError("`prompt_ids` is empty: give at least one token, such as end-of-text")
    return [[int(token) for token in row] for row in rows], single


def _steps(
    model: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop_ids: Collection[int],
    generator: torch.Generator | None,
    vocab_limit: int | None,
) -> Iterator[tuple[list[int | None], Tensor]]:
    """Each step's new token per row, None for a row that has stopped; and its logits [B, V]."""
    config = model.config
    limit = config.vocab_size if vocab_limit is None else vocab_limit
    longest = max(len(prompt) for prompt in prompts)
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, limit)
    device = model.embed.weight.device
    ids_BT = torch.tensor(
        [prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device
    )
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = KVCache(
        config,
        len(prompts),
        longest + max_new_tokens,
        device=device,
        dtype=model.compute_dtype,
    )
    stops = set(stop_ids)
    alive = [True] * len(prompts)
    # grad mode is switched around each step: it must not leak to the caller of a paused iterator
    for index in range(max_new_tokens):
        with torch.no_grad():
            logits_BTV = model(ids_BT, cache=cache)
            if index == 0:
                cache.keep(lengths_B)
                logits_BV = logits_BTV[torch.arange(len(prompts), device=device), lengths_B - 1]
            else:
                logits_BV = logits_BTV[:, -1]
            logits_BV = logits_BV[:, :limit]
            tokens_B = sample(
                logits_BV,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                generator=generator,
            )
        ids_BT = tokens_B[:, None]
        step: list[int | None] = []
        for row, token in enumerate(tokens_B.tolist()):
            alive[row] = alive[row] and token not in stops
            step.append(token if alive[row] else None)
        if not any(alive):
            return
        yield step, logits_BV


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id per row, int64 [B], from `softmax(logits / temperature)` as restricted."""
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        threshold = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < threshold, -torch.inf)
    probs_BV = logits_BV.softmax(dim=-1)
    if top_p is not None and top_p < 1.0:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        # a token stays while the mass before it is under top_p, so the likeliest always stays
        outside = sorted_BV.cumsum(dim=-1) - sorted_BV >= top_p
        probs_BV = probs_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside, 0.0))
    return torch.multinomial(probs_BV, 1, generator=generator)[:, 0]


def _check(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    limit: int,
) -> None:
    config = model.config
    longest = max(len(prompt) for prompt in prompts)
    if max_new_tokens < 0:
        raise ValueError(f"`max_new_tokens` must be at least 0, not {max_new_tokens!r}")
    if longest + max_new_tokens > config.max_seq_len:
        raise ValueError(
            f"{longest!r} prompt tokens plus `max_new_tokens` {max_new_tokens!r} exceed the "
            f"model's `max_seq_len` {config.max_seq_len!r}: shorten the prompt or ask for fewer"
        )
    if not temperature >= 0.0:
        raise ValueError(f"`temperature` must be at least 0, not {temperature!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1 or None, not {top_k!r}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"`top_p` must be in (0, 1] or None, not {top_p!r}")
    if not 1 <= limit <= config.vocab_size:
        raise ValueError(f"`vocab_limit` must be in 1..{config.vocab_size}, not {limit!r}")
    largest = max(max(prompt) for prompt in prompts)
    if largest >= limit or min(min(prompt) for prompt in prompts) < 0:
        raise ValueError(
            f"`prompt_ids` holds ids outside 0..{limit - 1}: {largest!r} is the largest"
        )
