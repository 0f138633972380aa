"""Batched log-likelihoods against one sequence at a time in float64."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matilda_model import ModelConfig, Transformer
from matilda_train.evals.scoring import Pair, ScoredTransformer, rolling_pairs, score_pairs

MAX_SEQ_LEN = 24
VOCAB = 64


@functools.cache
def model(**changes: object) -> Transformer:
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "max_seq_len": MAX_SEQ_LEN,
        "mlp": "relu2",
        "logit_softcap": 15.0,
        "embed_init_std": 0.4,  # so that the tokens' probabilities differ
    }
    return Transformer(ModelConfig(**(shape | changes))).eval()  # type: ignore[arg-type]


@torch.no_grad()
def one_at_a_time(model: Transformer, pair: Pair) -> tuple[float, bool]:
    """The definition, in float64 after the logits."""
    ids = [*pair.context, *pair.continuation][-(MAX_SEQ_LEN + 1) :]
    logits = model(torch.tensor([ids[:-1]]))[0].double()
    logprobs = logits.log_softmax(-1)[-len(pair.continuation) :]
    targets = torch.tensor(pair.continuation)
    picked = logprobs.gather(-1, targets[:, None])[:, 0]
    return float(picked.sum()), bool((logprobs.argmax(-1) == targets).all())


def draw_pairs(seed: int, n: int) -> list[Pair]:
    """Pairs of all lengths; many share a context, some go past the longest sequence."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(low, high))]

    contexts = [tokens(1, MAX_SEQ_LEN + 8) for _ in range(max(1, n // 3))]
    return [Pair(draw.choice(contexts), tokens(1, draw.choice([1, 1, 5]))) for _ in range(n)]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 20),
    batch_tokens=st.sampled_from([1, 40, 100, 10_000]),
    logit_bytes=st.sampled_from([1, 4 * VOCAB * 3, 1 << 20]),
    windowed=st.booleans(),
)
def test_scores_are_those_of_one_sequence_at_a_time_however_they_are_batched(
    seed: int, n: int, batch_tokens: int, logit_bytes: int, windowed: bool
) -> None:
    tested = model(window=8, window_pattern="SL") if windowed else model()
    pairs = draw_pairs(seed, n)
    scores = score_pairs(
        ScoredTransformer(tested), pairs, batch_tokens=batch_tokens, logit_bytes=logit_bytes
    )
    expected = [one_at_a_time(tested, pair) for pair in pairs]
    np.testing.assert_allclose(scores.loglikelihood, [e[0] for e in expected], rtol=1e-5, atol=1e-5)
    assert scores.greedy.tolist() == [e[1] for e in expected]


def test_the_order_of_the_requests_does_not_matter() -> None:
    pairs = draw_pairs(3, 30)
    order = random.Random(0).sample(range(30), 30)
    scored = ScoredTransformer(model())
    straight = score_pairs(scored, pairs)
    shuffled = score_pairs(scored, [pairs[i] for i in order])
    # The same rows in the same batches: bit for bit.
    assert shuffled.loglikelihood.tolist() == straight.loglikelihood[order].tolist()


def test_greedy_continuations_are_found() -> None:
    scored, context, found = model(), [5, 9, 2], []
    for _ in range(4):
        with torch.no_grad():
            found.append(int(scored(torch.tensor([[*context, *found]]))[0, -1].argmax()))
    wrong = [*found[:-1], (found[-1] + 1) % VOCAB]
    pairs = [Pair(context, found), Pair(context, wrong), Pair(context, found[:1])]
    assert score_pairs(ScoredTransformer(scored), pairs).greedy.tolist() == [True, False, True]


def test_requests_that_begin_alike_share_a_row() -> None:
    class Counting(ScoredTransformer):
        rows = 0

        def hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
            self.rows += len(ids_BT)
            return super().hidden(ids_BT)

    scored = Counting(model())
    context = [1, 2, 3]
    one_token = [Pair(context, [token]) for token in range(10)]
    score_pairs(scored, [*one_token, Pair(context, [4, 5]), Pair([7], [8])])
    assert scored.rows == 2


def test_progress_reaches_the_end_and_can_end_the_scoring() -> None:
    told: list[tuple[int, int]] = []
    pairs = draw_pairs(1, 12)
    score_pairs(
        ScoredTransformer(model()),
        pairs,
        batch_tokens=30,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_pairs(ScoredTransformer(model()), pairs, on_progress=stop)


def test_nothing_to_score_gives_nothing() -> None:
    assert score_pairs(ScoredTransformer(model()), []).loglikelihood.shape == (0,)


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (Pair([], [1]), "no tokens"),
        (Pair([1], []), "no tokens"),
        (Pair([1], [2] * (MAX_SEQ_LEN + 1)), "25 tokens exceeds"),
    ],
)
def test_what_cannot_be_scored_is_refused(pair: Pair, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        score_pairs(ScoredTransformer(model()), [pair])


def test_scoring_leaves_random_generators_and_training_alone() -> None:
    trained = model().train()
    state = torch.get_rng_state()
    try:
        score_pairs(ScoredTransformer(trained), draw_pairs(0, 5))
        assert trained.training
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.is_grad_enabled()
    finally:
        trained.eval()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_in_bfloat16_scores_as_a_cpu_does_but_for_rounding() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50304,
        d_model=256,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=256,
        mlp="relu2",
        logit_softcap=30.0,
        embed_init_std=0.05,
    )
    tested, draw = Transformer(config).eval(), random.Random(0)
    pairs = [
        Pair(
            [draw.randrange(50257) for _ in range(draw.randint(1, 300))],
            [draw.randrange(50257) for _ in range(draw.randint(1, 40))],
        )
        for _ in range(200)
    ]
    expected = score_pairs(ScoredTransformer(tested), pairs)
    tested.compute_dtype = torch.bfloat16
    found = score_pairs(ScoredTransformer(tested.cuda()), pairs)
    np.testing.assert_allclose(found.loglikelihood, expected.loglikelihood, rtol=2e-3)
    assert (found.greedy == expected.greedy).mean() > 0.98


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 100), longest=st.integers(2, 30))
def test_rolling_windows_score_every_token_once_with_all_the_context_that_fits(
    n: int, longest: int
) -> None:
    tokens = list(range(1, n + 1))
    pairs = rolling_pairs(tokens, 0, longest)
    assert [token for pair in pairs for token in pair.continuation] == tokens
    for index, pair in enumerate(pairs):
        first = pair.continuation[0]
        before = [0, *tokens][max(0, first - len(pair.context)) : first]
        assert list(pair.context) == before
        room = longest + 1 - len(pair.continuation)
        assert len(pair.context) == (1 if index == 0 else room)
