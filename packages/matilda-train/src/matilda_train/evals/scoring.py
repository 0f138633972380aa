"""Log-likelihoods of continuations, many at once, as lm-evaluation-harness defines them.

Requests are cut to the model's longest sequence from the left, put next to others of their length,
padded on the right (a causal model never sees that) and run `batch_tokens` tokens at a time. A
request whose tokens begin another request's shares its row, as choices of one token do. Logits
exist only for the positions that are scored, `logit_bytes` of them at once, and nothing waits for
the device before the end.

Shape suffixes: B batch, T sequence, D what the head multiplies, V vocabulary, N scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from matilda_model import Transformer

__all__ = ["Pair", "ScoredModel", "ScoredTransformer", "Scores", "rolling_pairs", "score_pairs"]

GPU_BATCH_TOKENS = 65_536
CPU_BATCH_TOKENS = 4_096
GPU_LOGIT_BYTES = 1 << 29
CPU_LOGIT_BYTES = 1 << 24
LENGTH_STEP = 8  # padded lengths are multiples: fewer shapes, and GEMMs like them


class Pair(NamedTuple):
    """What is given and what is scored, as token ids; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class ScoredModel(Protocol):
    """What scoring needs of a model."""

    @property
    def max_seq_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """[B, T, D] for int64 ids."""
        ...

    def logits(self, h_ND: Tensor) -> Tensor:
        """float32 [N, V]."""
        ...


class ScoredTransformer:
    """A `Transformer`, in its own compute dtype."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.max_seq_len = model.config.max_seq_len
        self.vocab_size = model.config.vocab_size
        self.device = model.embed.weight.device

    def hidden(self, ids_BT: Tensor) -> Tensor:
        return self.model.hidden(ids_BT)

    def logits(self, h_ND: Tensor) -> Tensor:
        return self.model.logits(h_ND)


@dataclass(frozen=True)
class Scores:
    """One entry a pair, in the order given."""

    loglikelihood: NDArray[np.float64]
    """Log-probability of the whole continuation, nats."""

    greedy: NDArray[np.bool_]
    """Whether each of its tokens was the likeliest."""


@dataclass(frozen=True)
class _Batch:
    """Rows to run together, and where in them continuations are scored."""

    ids: NDArray[np.int64]
    """[B, T]."""
    places: NDArray[np.int64]
    """[N] scored positions, as indices into the flattened [B * T]."""
    targets: NDArray[np.int64]
    """[N]."""
    pairs: list[int]
    """Whose continuations those are, one after the other."""
    n_tokens: int
    """Without padding."""


@torch.no_grad()
def score_pairs(
    model: ScoredModel,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int | None = None,
    logit_bytes: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Score every pair.

    `batch_tokens` bounds the tokens of a batch, padding included (one sequence at least), and
    `logit_bytes` the float32 logits held at once (one position's at least); by default what suits
    the device. The results do not depend on either but for rounding. `on_progress(done, total)` is
    called with tokens before each batch; what it raises ends the scoring.

    Raises `ValueError` for an empty context or continuation, and for a continuation longer than the
    model's longest sequence.
    """
    on_cpu = model.device.type == "cpu"
    batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
    logit_bytes = logit_bytes or (CPU_LOGIT_BYTES if on_cpu else GPU_LOGIT_BYTES)
    n_rows = max(1, logit_bytes // (4 * model.vocab_size))
    inputs = [_inputs(pair, model.max_seq_len) for pair in pairs]
    rows = _share_rows(inputs)
    total, done = sum(len(inputs[row]) for row in rows), 0
    order: list[int] = []
    logprobs: list[Tensor] = []
    greedy: list[Tensor] = []
    for batch in _batches(pairs, inputs, rows, batch_tokens, model.max_seq_len):
        on_progress(done, total)
        ids_BT = _to_device(batch.ids, model.device)
        h_ND = model.hidden(ids_BT).flatten(0, 1)[_to_device(batch.places, model.device)]
        targets_N = _to_device(batch.targets, model.device)
        for h, targets in zip(
            torch.split(h_ND, n_rows), torch.split(targets_N, n_rows), strict=True
        ):
            logits_NV = model.logits(h)
            picked_N = logits_NV.gather(-1, targets[:, None])[:, 0]
            logprobs.append(picked_N - torch.logsumexp(logits_NV, dim=-1))
            greedy.append(logits_NV.argmax(dim=-1) == targets)
        order += batch.pairs
        done += batch.n_tokens
    on_progress(done, total)
    scores = Scores(np.zeros(len(pairs)), np.ones(len(pairs), dtype=np.bool_))
    if order:
        lengths = np.array([len(pairs[index].continuation) for index in order])
        starts = np.cumsum(lengths) - lengths
        sums = np.add.reduceat(torch.cat(logprobs).cpu().numpy().astype(np.float64), starts)
        scores.loglikelihood[order] = sums
        scores.greedy[order] = np.logical_and.reduceat(torch.cat(greedy).cpu().numpy(), starts)
    return scores


def rolling_pairs(tokens: Sequence[int], prefix_token: int, max_seq_len: int) -> list[Pair]:
    """The whole of `tokens` as pairs that score each token once.

    The first window is conditioned on `prefix_token`, and the last on as much as fits: the windows
    of lm-evaluation-harness.
    """
    tokens = list(tokens)
    pairs = [Pair([prefix_token], tokens[:max_seq_len])] if tokens else []
    for first in range(max_seq_len, len(tokens), max_seq_len):
        stop = min(first + max_seq_len, len(tokens))
        pairs.append(Pair(tokens[stop - max_seq_len - 1 : first], tokens[first:stop]))
    return pairs


def _inputs(pair: Pair, max_seq_len: int) -> NDArray[np.uint32]:
    """What the model reads to predict the continuation, cut from the left."""
    if not len(pair.context) or not len(pair.continuation):
        raise ValueError("A context or a continuation has no tokens; give each at least one.")
    if len(pair.continuation) > max_seq_len:
        raise ValueError(
            f"A continuation of {len(pair.continuation)} tokens exceeds the model's longest "
            f"sequence of {max_seq_len}; leave that item out."
        )
    whole = np.concatenate([np.asarray(part, dtype=np.uint32) for part in pair])
    return whole[-(max_seq_len + 1) :][:-1]


def _share_rows(inputs: Sequence[NDArray[np.uint32]]) -> dict[int, list[int]]:
    """Rows to run, longest first, each with all pairs that it serves; keys are pairs too."""
    # Big-endian bytes sort as the ids do, and what begins another comes right before it.
    keys = [each.astype(">u4").tobytes() for each in inputs]
    rows: dict[int, list[int]] = {}
    row = -1
    for index in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):
        if row < 0 or not keys[row].startswith(keys[index]):
            row = index
            rows[row] = []
        rows[row].append(index)
    return dict(sorted(rows.items(), key=lambda item: (-len(inputs[item[0]]), item[0])))


def _batches(
    pairs: Sequence[Pair],
    inputs: Sequence[NDArray[np.uint32]],
    rows: dict[int, list[int]],
    batch_tokens: int,
    max_seq_len: int,
) -> Iterator[_Batch]:
    order, first = list(rows), 0
    while first < len(order):
        width = -(-len(inputs[order[first]]) // LENGTH_STEP) * LENGTH_STEP
        width = min(width, max_seq_len)
        chosen = order[first : first + max(1, batch_tokens // width)]
        ids_BT = np.zeros((len(chosen), width), dtype=np.int64)
        places, served = [], []
        for b, row in enumerate(chosen):
            ids_BT[b, : len(inputs[row])] = inputs[row]
            served += rows[row]
            for index in rows[row]:
                stop = b * width + len(inputs[index])
                places.append(np.arange(stop - len(pairs[index].continuation), stop))
        yield _Batch(
            ids=ids_BT,
            places=np.concatenate(places),
            targets=np.concatenate(
                [np.asarray(pairs[index].continuation, dtype=np.int64) for index in served]
            ),
            pairs=served,
            n_tokens=sum(len(inputs[row]) for row in chosen),
        )
        first += len(chosen)


def _to_device(array: NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
