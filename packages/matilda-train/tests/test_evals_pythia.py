"""Pythia's curves as a scale: exact at its checkpoints, monotone, bounded at both ends."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matilda_train.evals.pythia import (
    CLEAN,
    Curve,
    compare_with,
    describe,
    footnotes,
    pythia_curves,
)

MODELS = ["pythia-70m", "pythia-160m", "pythia-160m-deduped", "pythia-410m", "pythia-1.4b"]
TOKENS_PER_STEP = 2_097_152


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_that_is_the_best_so_far_equals_its_own_tokens(model: str) -> None:
    records = 0
    for task, curve in pythia_curves(model).items():
        for index, (tokens, acc) in enumerate(zip(curve.tokens, curve.acc, strict=True)):
            if index == 0 or acc > curve.acc[:index].max():
                assert curve.equal_tokens(acc) == tokens, (task, tokens)
                records += 1
            else:
                assert curve.equal_tokens(acc) < tokens
    assert records >= 20


def test_the_numbers_are_those_published() -> None:
    curve = pythia_curves("pythia-160m")["sciq"]
    at = {
        round(tokens / TOKENS_PER_STEP): acc
        for tokens, acc in zip(curve.tokens, curve.acc, strict=True)
    }
    assert [at[step] for step in (512, 1000, 3000, 143000)] == [0.247, 0.427, 0.653, 0.741]


scores = st.floats(0, 1)


@given(first=scores, second=scores, model=st.sampled_from(MODELS))
def test_a_higher_score_never_equals_fewer_tokens(first: float, second: float, model: str) -> None:
    for curve in pythia_curves(model).values():
        low, high = sorted((first, second))
        assert curve.equal_tokens(low) <= curve.equal_tokens(high)


def test_between_two_checkpoints_tokens_grow_with_the_score_as_their_logarithm_does() -> None:
    curve = Curve(np.array([1e6, 1e8]), np.array([0.2, 0.4]), np.array([0.01, 0.01]))
    assert curve.equal_tokens(0.3) == pytest.approx(1e7)
    assert curve.equal_tokens(0.19) == 0
    assert curve.equal_tokens(0.2) == 1e6
    assert curve.equal_tokens(0.4) == 1e8
    assert math.isinf(curve.equal_tokens(0.41))


def test_a_dip_in_the_curve_does_not_count() -> None:
    acc = np.array([0.2, 0.4, 0.3, 0.5])
    curve = Curve(np.array([1e6, 1e7, 1e8, 1e9]), acc, np.full(4, 0.01))
    assert curve.equal_tokens(0.3) < 1e7
    assert 1e8 < curve.equal_tokens(0.45) < 1e9


def test_a_run_stands_between_the_checkpoints_around_its_tokens() -> None:
    run = {"arc_easy": (0.31, 2376), "sciq": (0.5, 1000), "hellaswag": (0.28, 10042)}
    comparison = compare_with("pythia-160m", run, tokens=540_000_000)
    assert list(comparison.standings) == ["arc_easy", "sciq", "average"]
    sciq = comparison.standings["sciq"]
    assert sciq.before is not None
    assert sciq.after is not None
    assert (sciq.before[0], sciq.after[0]) == (256 * TOKENS_PER_STEP, 512 * TOKENS_PER_STEP)
    assert 1000 * TOKENS_PER_STEP < sciq.equal < 3000 * TOKENS_PER_STEP
    assert sciq.interval[0] < sciq.equal < sciq.interval[1]
    text = "\n".join([*describe(comparison), *footnotes()])
    for words in (
        "540M",
        "at 537M",
        "at 1.1B",
        "HellaSwag is not among",
        "a19eecb807ec",
        "test split",
    ):
        assert words in text
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_what_lies_outside_the_curve_is_only_bounded() -> None:
    run = {"sciq": (0.99, 1000), "arc_easy": (0.1, 2376)}
    comparison = compare_with("pythia-160m", run, tokens=10**6)
    found = comparison.to_dict()
    assert found["sciq"]["equal_tokens"] == "beyond"
    assert found["arc_easy"]["equal_tokens"] == "below"
    assert found["sciq"]["pythia_before"] is None
    text = "\n".join(describe(comparison))
    assert "> 300B" in text
    assert "< 2.1M" in text
    late = compare_with("pythia-160m", run, tokens=10**12).standings["sciq"]
    assert late.after is None


def test_a_score_that_several_checkpoints_have_equals_all_of_them() -> None:
    found = compare_with("pythia-160m", {"lambada_openai": (0.0, 5153)}, tokens=540_000_000)
    assert found.to_dict()["lambada_openai"]["equal_tokens_95"] == [
        TOKENS_PER_STEP,
        512 * TOKENS_PER_STEP,
    ]


def test_an_interval_narrows_with_more_items() -> None:
    def width(items: int) -> float:
        standing = compare_with("pythia-410m", {"piqa": (0.62, items)}, tokens=1).standings["piqa"]
        return math.log(standing.interval[1] / standing.interval[0])

    assert width(100_000) < width(300)


def test_the_average_takes_the_clean_form_of_a_task() -> None:
    run = {"sciq": (0.7, 1000), "sciq" + CLEAN: (0.5, 882), "piqa": (0.6, 1838)}
    comparison = compare_with("pythia-160m", run, tokens=10**9)
    assert comparison.standings["average"].score == pytest.approx(0.55)
    assert comparison.standings["sciq"].equal > comparison.standings["sciq" + CLEAN].equal


def test_an_unknown_pythia_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'pythia-2b'.*pythia-160m"):
        compare_with("pythia-2b", {"piqa": (0.5, 10)}, tokens=1)


def test_equal_scores_give_equal_intervals() -> None:
    run = {"piqa": (0.6, 1838)}
    assert compare_with("pythia-160m", run, tokens=5) == compare_with("pythia-160m", run, tokens=5)
