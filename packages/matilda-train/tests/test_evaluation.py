"""The held-out loss is of every window asked for, however they are cut into batches and shared."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from matilda_train.data_source import SyntheticStream
from matilda_train.distributed import Ranks
from matilda_train.evaluation import Evaluation, evaluate

SEQ_LEN = 5
VOCAB = 17
TOKEN_BYTES = np.arange(VOCAB, dtype=np.int32) % 4


class FewWindows(SyntheticStream):
    """Each window a function of its number; there are `n_windows`, and none past them."""

    def __init__(self, n_windows: int) -> None:
        super().__init__(vocab_size=VOCAB, seq_len=SEQ_LEN, seed=3)
        self.n_windows = n_windows  # type: ignore[misc]

    def windows(self, first: int, count: int) -> np.ndarray:
        assert count >= 1
        assert first + count <= self.n_windows
        rows = [super(FewWindows, self).windows(first + i, 1) for i in range(count)]
        return np.concatenate(rows)


class Bigrams(nn.Module):
    """A table of losses, and a note of the shapes and modes that it has met."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        self.register_buffer("table", table)
        self.shapes: set[torch.Size] = set()
        self.trained: set[bool] = set()

    def forward(self, inputs: Tensor, targets: Tensor, *, per_token: bool) -> Tensor:
        self.shapes.add(inputs.shape)
        self.trained.add(self.training)
        losses: Tensor = self.table[inputs, targets]  # type: ignore[index]
        return losses


class Threads:
    """What the ranks of one process have in common."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.values: list[Tensor] = []


class ThreadRanks(Ranks):
    """Ranks that are threads, and meet where processes would."""

    common: Threads

    def mean_(self, value: Tensor) -> Tensor:
        self.common.values.append(value.clone())
        self.common.barrier.wait()
        return value.copy_(torch.stack(self.common.values).mean(dim=0))

    def any(self, flag: bool) -> bool:
        self.common.barrier.wait()
        return flag


def evaluate_on(world_size: int, micro: int, stream: FewWindows, tokens: int) -> list[Evaluation]:
    """What each rank comes to; their micro-batches must be of one shape."""
    threads, models = Threads(world_size), [Bigrams() for _ in range(world_size)]

    def one(rank: int) -> Evaluation:
        ranks = ThreadRanks(rank=rank, world_size=world_size)
        object.__setattr__(ranks, "common", threads)
        result = evaluate(
            models[rank],
            stream,
            max_tokens=tokens,
            seq_len=SEQ_LEN,
            micro_batch_size=micro,
            token_bytes=TOKEN_BYTES,
            device=torch.device("cpu"),
            ranks=ranks,
        )
        assert result is not None
        return result

    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(one, range(world_size)))
    assert len(set().union(*(model.shapes for model in models))) == 1
    return results


def expected(stream: FewWindows, numbers: Sequence[int]) -> Evaluation:
    """The sum over windows, one at a time."""
    rows = np.concatenate([stream.windows(number, 1) for number in numbers]).astype(np.int64)
    losses = Bigrams().table.double().numpy()[rows[:, :-1], rows[:, 1:]]  # type: ignore[operator]
    n_bytes = TOKEN_BYTES[rows[:, 1:]].sum()
    return Evaluation(
        val_loss_nats=losses.mean(),
        val_bits_per_byte=losses.sum() / math.log(2) / max(n_bytes, 1),
        val_tokens=losses.size,
    )


@settings(max_examples=60, deadline=None)
@given(
    world_size=st.integers(1, 4),
    micro=st.integers(1, 6),
    there=st.integers(1, 20),
    tokens=st.integers(1, 25 * SEQ_LEN),
)
def test_every_window_asked_for_counts_once_whatever_micro_batch_and_ranks(
    world_size: int, micro: int, there: int, tokens: int
) -> None:
    stream = FewWindows(there)
    wanted = expected(stream, range(max(1, min(there, tokens // SEQ_LEN))))
    for found in evaluate_on(world_size, micro, stream, tokens):
        assert found.val_tokens == wanted.val_tokens
        assert found.val_loss_nats == pytest.approx(wanted.val_loss_nats, rel=1e-12)
        assert found.val_bits_per_byte == pytest.approx(wanted.val_bits_per_byte, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stopped", [True, False])
def test_a_model_is_judged_in_its_evaluation_mode_and_given_back_as_it_was(
    training: bool, stopped: bool
) -> None:
    model = Bigrams().train(training)
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(True)
        return stopped and len(asked) == 2

    result = evaluate(
        model,
        FewWindows(3),
        max_tokens=3 * SEQ_LEN,
        seq_len=SEQ_LEN,
        micro_batch_size=1,
        token_bytes=TOKEN_BYTES,
        device=torch.device("cpu"),
        ranks=Ranks(rank=0, world_size=1),
        should_stop=should_stop,
    )
    assert (result is None) is stopped
    assert model.trained == {False}
    assert model.training is training
