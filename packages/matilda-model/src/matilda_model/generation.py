"""Sampling with a KV cache.

Shape suffixes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, TypedDict, Unpack, overload

import torch
from torch import Tensor

from matilda_model.cache import KVCache
from matilda_model.model import Transformer
from matilda_model.pretrained import unwrapped

Prompt = Sequence[int] | Tensor
"""Token ids; a tensor [T] too."""

_GREEDY = 1e-5  # temperatures below divide float32 logits out of range, and draw the same


class Sampling(TypedDict, total=False):
    """How tokens are drawn: keyword arguments of `generate`, `stream_tokens`, `stream_choices`."""

    temperature: float
    """1.0 by default; 0 (or under 1e-5) takes the likeliest token."""
    top_k: int | None
    """Draw from this many likeliest tokens only."""
    top_p: float | None
    """Draw from the likeliest tokens that together have this probability (nucleus, Holtzman et al.
    2020)."""
    stop_ids: Collection[int]
    """Ids that end a row; not returned."""
    vocab_limit: int | None
    """The tokenizer's true size: ids from there on, padding of the vocabulary, are not produced."""
    generator: torch.Generator | Sequence[torch.Generator] | None
    """Source of the draws, on the model's device; None is torch's default one. One generator is
    shared by the rows of a batch, so that a row's draws depend on its neighbours: a list with one
    for each row makes them independent."""


@overload
def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_when: Callable[[Sequence[int]], bool] | None = None,
    **sampling: Unpack[Sampling],
) -> list[int]: ...


@overload
def generate(
    model: Transformer,
    prompt_ids: Sequence[Prompt] | Tensor,
    *,
    max_new_tokens: int,
    stop_when: Callable[[Sequence[int]], bool] | None = None,
    **sampling: Unpack[Sampling],
) -> list[list[int]]: ...


def generate(
    model: Transformer,
    prompt_ids: Sequence[int] | Sequence[Prompt] | Tensor,
    *,
    max_new_tokens: int,
    stop_when: Callable[[Sequence[int]], bool] | None = None,
    **sampling: Unpack[Sampling],
) -> list[int] | list[list[int]]:
    """Continue one prompt (a list of ids) or several (a list of lists, or a tensor [B, T]).

    Returns the new ids only, without the prompt and without the stop id that ended a row: a list
    for one prompt, a list of lists for several. Prompts may have unequal lengths.

    `stop_when` is asked with a row's new ids after each one and ends the row, which keeps it, when
    true. The other arguments are `Sampling`'s: `temperature`, `top_k`, `top_p`, `stop_ids`,
    `vocab_limit`, `generator`. Raises ValueError for values out of range and when prompt plus
    `max_new_tokens` exceed the model's `max_seq_len`. What DDP wrapped is unwrapped.
    """
    prompts, single = _as_prompts(prompt_ids)
    rows: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for step, _ in _decode(model, prompts, max_new_tokens, **sampling):
        for row, token in enumerate(step):
            if token is None or ended[row]:
                ended[row] = True
                continue
            rows[row].append(token)
            ended[row] = stop_when is not None and stop_when(rows[row])
        if all(ended):
            break
    return rows[0] if single else rows


def stream_tokens(
    model: Transformer,
    prompt_ids: Prompt,
    *,
    max_new_tokens: int,
    **sampling: Unpack[Sampling],
) -> Iterator[int]:
    """As `generate` for one prompt, yielding each id as soon as it is drawn."""
    steps = _decode(model, [_one_prompt(prompt_ids)], max_new_tokens, **sampling)
    return (token for (token,), _ in steps if token is not None)


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
    prompt_ids: Prompt,
    *,
    max_new_tokens: int,
    candidates: int = 10,
    **sampling: Unpack[Sampling],
) -> Iterator[Choice]:
    """As `stream_tokens`, with the probabilities of the `candidates` likeliest ids at a place."""
    if candidates < 0:
        raise ValueError(f"`candidates` must be at least 0, not {candidates!r}")
    steps = _decode(model, [_one_prompt(prompt_ids)], max_new_tokens, **sampling)
    return (
        _choice(logits[0], token, candidates) for (token,), logits in steps if token is not None
    )


def _choice(logits_V: Tensor, token: int, candidates: int) -> Choice:
    probs_V = logits_V.float().softmax(dim=-1)
    top = probs_V.topk(min(candidates, len(probs_V)))
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Choice(token, float(probs_V[token]), tuple(likeliest))


def _one_prompt(prompt_ids: Prompt) -> list[int]:
    prompts, single = _as_prompts(prompt_ids)
    if not single:
        raise ValueError("`prompt_ids` must be one prompt to stream: use `generate` for several")
    return prompts[0]


def _as_prompts(prompt_ids: Any) -> tuple[list[list[int]], bool]:
    """Plain rows of ids, and whether one prompt was meant."""
    try:
        values = [_plain(value) for value in _plain(prompt_ids)]
        single = not any(isinstance(value, Sequence) for value in values)
        rows = [[index(token) for token in row] for row in ([values] if single else values)]
    except TypeError as error:
        raise ValueError(
            f"`prompt_ids` must be token ids, or several rows of them ({error}): encode text first"
        ) from error
    if not all(rows):
        raise ValueError("`prompt_ids` is empty: give at least one token, such as end-of-text")
    return rows, single


def _plain(values: Any) -> Any:
    """A tensor or array as Python's lists and numbers."""
    return values.tolist() if hasattr(values, "tolist") else values


def _decode(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    vocab_limit: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[tuple[list[int | None], Tensor]]:
    """Check the arguments now; then each step's new token per row, None for a row that has
    stopped, and its logits [B, V]."""
    if not hasattr(model, "config"):  # DDP's wrapper; that of torch.compile has its model's
        model = unwrapped(model)
    config = model.config
    _check_sampling(temperature, top_k, top_p)
    if not _is_integer(max_new_tokens) or max_new_tokens < 0:
        raise ValueError(
            f"`max_new_tokens` must be an integer of at least 0, not {max_new_tokens!r}"
        )
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > config.max_seq_len:
        raise ValueError(
            f"{longest!r} prompt tokens plus `max_new_tokens` {max_new_tokens!r} exceed the "
            f"model's `max_seq_len` {config.max_seq_len!r}: shorten the prompt or ask for fewer"
        )
    limit = config.vocab_size if vocab_limit is None else vocab_limit
    if not _is_integer(limit) or not 1 <= limit <= config.vocab_size:
        raise ValueError(
            f"`vocab_limit` must be in 1..{config.vocab_size}, an integer, not {limit!r}"
        )
    for token in (token for prompt in prompts for token in prompt):
        if not 0 <= token < limit:
            raise ValueError(f"`prompt_ids` holds {token!r}, which is outside 0..{limit - 1}")
    if isinstance(generator, Sequence) and len(generator) != len(prompts):
        raise ValueError(
            f"`generator` has {len(generator)!r} generators for {len(prompts)!r} prompts: "
            "give one, or one for each"
        )
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _steps(model, prompts, max_new_tokens, _as_stops(stop_ids), limit, draw)


def _steps(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: set[int],
    limit: int,
    draw: Callable[[Tensor], Tensor],
) -> Iterator[tuple[list[int | None], Tensor]]:
    device = model.embed.weight.device
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor(
        [prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device
    )
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = KVCache(
        model.config,
        len(prompts),
        longest + max_new_tokens,
        device=device,
        dtype=model.compute_dtype,
    )
    alive = [True] * len(prompts)
    # grad mode is switched around each step: it must not leak to the caller of a paused iterator
    for count in range(max_new_tokens):
        with torch.no_grad():
            if count == 0:
                logits_BV = _logits(model, ids_BT, cache, lengths_B - 1)
                cache.keep(lengths_B)
            else:
                logits_BV = _logits(model, ids_BT, cache)[:, -1]
            logits_BV = logits_BV[:, :limit]
            tokens_B = draw(logits_BV)
        ids_BT = tokens_B[:, None]
        step: list[int | None] = []
        for row, token in enumerate(tokens_B.tolist()):
            alive[row] = alive[row] and token not in stops
            step.append(token if alive[row] else None)
        if not any(alive):
            return
        yield step, logits_BV


def _logits(
    model: Transformer, ids_BT: Tensor, cache: KVCache, places_B: Tensor | None = None
) -> Tensor:
    """The model's; of a compiled one uncompiled for shapes that its graphs are not for.

    With `dynamic=False` each step is a graph of its own, and with `fullgraph=True` torch raises
    when there are too many.
    """
    logits: Tensor
    try:
        logits = model(ids_BT, cache=cache, places_B=places_B)
    except Exception as error:
        if type(error).__name__ != "FailOnRecompileLimitHit":  # importing it takes seconds
            raise
        with torch.compiler.set_stance("force_eager"):
            logits = model(ids_BT, cache=cache, places_B=places_B)
    return logits


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw one id per row, int64 [B], from `softmax(logits / temperature)` as restricted.

    The arguments are those of `Sampling`. Raises ValueError for values out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature < _GREEDY:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and index(top_k) < logits_BV.shape[-1]:
        # these alone, also where others have equal logits
        kept = logits_BV.topk(index(top_k), dim=-1)
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(-1, kept.indices, kept.values)
    probs_BV = logits_BV.softmax(dim=-1)
    if top_p is not None and top_p < 1.0:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        # a token stays while the mass before it is under top_p, which float32 may round to 0
        outside = sorted_BV.cumsum(dim=-1) - sorted_BV >= top_p
        outside[..., 0] = False
        probs_BV = probs_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside, 0.0))
    if isinstance(generator, Sequence):
        rows = zip(probs_BV, generator, strict=True)
        return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])
    return torch.multinomial(probs_BV, 1, generator=generator)[:, 0]


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not temperature >= 0.0:
        raise ValueError(f"`temperature` must be at least 0, not {temperature!r}")
    if top_k is not None and not (_is_integer(top_k) and index(top_k) >= 1):
        raise ValueError(f"`top_k` must be an integer of at least 1, or None, not {top_k!r}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"`top_p` must be in (0, 1] or None, not {top_p!r}")


def _is_integer(value: Any) -> bool:
    """Whether Python takes `value` for an integer: numpy's, too."""
    try:
        index(value)
    except TypeError:
        return False
    return True


def _as_stops(stop_ids: Any) -> set[int]:
    """Plain numbers: a tensor's elements would be equal to no id, and a row would never stop."""
    try:
        return {index(token) for token in stop_ids}
    except TypeError as error:
        raise ValueError(
            f"`stop_ids` must hold token ids, not {stop_ids!r} ({error}): give a list of integers"
        ) from error
