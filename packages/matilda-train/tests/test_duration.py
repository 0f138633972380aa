"""Durations as people write them, and when something is due."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matilda_train.cadence import Cadence
from matilda_train.duration import Duration, parse_count
from matilda_train.step_plan import StepPlan

durations = st.one_of(
    st.builds(Duration, st.integers(0, 10**18), st.sampled_from(["steps", "tokens"])),
    st.builds(Duration, st.floats(0, 1e15), st.just("seconds")),
    st.builds(lambda n: Duration(float(n * 60), "seconds"), st.integers(0, 10**6)),
)


@settings(deadline=None)
@given(durations)
def test_what_is_written_reads_back_the_same(duration: Duration) -> None:
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(
    ("text", "expected", "shown"),
    [
        ("250 steps", Duration(250, "steps"), "250 steps"),
        ("1 step", Duration(1, "steps"), "1 step"),
        (250, Duration(250, "steps"), "250 steps"),
        ("250", Duration(250, "steps"), "250 steps"),
        ("10M tokens", Duration(10_000_000, "tokens"), "10M tokens"),
        ("10e6 tokens", Duration(10_000_000, "tokens"), "10M tokens"),
        ("10,000,000 tokens", Duration(10_000_000, "tokens"), "10M tokens"),
        ("1.5B tokens", Duration(1_500_000_000, "tokens"), "1500M tokens"),
        ("524_288 tokens", Duration(524_288, "tokens"), "524288 tokens"),
        ("15 min", Duration(900.0, "seconds"), "15 min"),
        ("1.5 h", Duration(5400.0, "seconds"), "90 min"),
        ("0.1s", Duration(0.1, "seconds"), "0.1 s"),
        (" 2 days ", Duration(172_800.0, "seconds"), "2 d"),
    ],
)
def test_durations_are_read_and_shown(text: str | int, expected: Duration, shown: str) -> None:
    assert Duration.parse(text) == expected
    assert str(expected) == shown


@pytest.mark.parametrize(
    "text",
    ["", "tokens", "3B", "15 m", "-5 steps", "5 epochs", "1.5 steps", "1e99 tokens", "1e-3 tokens",
     "nan s", "5 steps 3", "1e9999999 s", -1],
)  # fmt: skip
def test_a_bad_duration_is_one_sentence(text: str | int) -> None:
    with pytest.raises(ValueError) as raised:
        Duration.parse(text)
    assert "\n" not in str(raised.value)
    assert str(text).strip() in str(raised.value)


def test_counts_are_exact() -> None:
    assert parse_count("1_048_576") == 2**20
    assert parse_count(" 0.5M ") == 500_000
    with pytest.raises(ValueError, match="whole number"):
        parse_count("0.5")


RAMPED = StepPlan(tokens_per_step=300, seq_len=100, batch_ramp=["7 steps: 500", "9k tokens: 1100"])


@settings(deadline=None)
@given(every=st.integers(1, 5000))
def test_every_so_many_tokens_is_due_once_for_each_multiple(every: int) -> None:
    cadence = Cadence(Duration(every, "tokens"), RAMPED)
    due = [step for step in range(1, 60) if cadence.due(step)]
    assert due == [
        step
        for step in range(1, 60)
        if any(t % every == 0 for t in range(RAMPED.tokens(step - 1) + 1, RAMPED.tokens(step) + 1))
    ]
    fresh = Cadence(Duration(every, "tokens"), RAMPED)
    assert [fresh.due(step) for step in (40, 41, 42)] == [step in due for step in (40, 41, 42)]


@settings(deadline=None)
@given(every=st.integers(1, 30))
def test_every_so_many_steps_is_due_at_its_multiples(every: int) -> None:
    cadence = Cadence(Duration(every, "steps"), RAMPED)
    assert [s for s in range(60) if cadence.due(s)] == list(range(0, 60, every))


def test_it_is_due_at_the_steps_to_be_kept_as_well() -> None:
    cadence = Cadence(Duration(10.0, "seconds"), RAMPED, also_steps=4, clock=lambda: 0.0)
    assert [step for step in range(13) if cadence.due(step)] == [0, 4, 8, 12]


def test_every_so_many_seconds_counts_from_the_last_time_and_asks_all_ranks() -> None:
    now, votes = 0.0, []

    def agree(due: bool) -> bool:
        votes.append(due)
        return due or len(votes) == 3

    cadence = Cadence(Duration(10.0, "seconds"), RAMPED, agree, clock=lambda: now)
    assert cadence.due(0)
    answers = []
    for now in (9.0, 11.0, 12.0, 21.0, 22.0):  # noqa: B007
        answers.append(cadence.due(5))
    # due at 11; at 12 another rank says so; from there, 10 seconds
    assert answers == [False, True, True, False, True]
    assert votes == [False, True, False, False, True]
