"""The order itself: golden vectors pin it for ever, and its quality is gated."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matilda_data.mixture import Mixture, Phase
from matilda_data.order import keys, permute

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 63, 64, 65, 99, 100, 101, 1000, 4095, 65536, 65537]


def test_golden_keys() -> None:
    assert [hex(key) for key in keys(5, "windows", "data", 0, 1).tolist()] == GOLDEN_KEYS


def test_golden_permutations() -> None:
    key = keys(8, "golden", 1)
    assert permute(np.arange(10), 10, key).tolist() == GOLDEN_TEN
    assert permute([0, 1, 2, 999_999], 1_000_000, key).tolist() == GOLDEN_MILLION
    assert permute([0, 1, 2**40], 2**41 + 5, key).tolist() == GOLDEN_HUGE


def test_golden_mixture() -> None:
    mixture = Mixture([Phase(start=0, weights=(15, 3, 2))], "golden", 1)
    source, index = mixture.locate(np.arange(24))
    assert source.tolist() == GOLDEN_SOURCES
    assert index.tolist() == GOLDEN_INDEXES


@pytest.mark.parametrize("n", SIZES)
def test_permutation_is_a_bijection(n: int) -> None:
    for seed in range(3):
        image = permute(np.arange(n), n, keys(8, "bijection", seed))
        assert sorted(image.tolist()) == list(range(n))


@given(n=st.integers(1, 2000), seed=st.integers())
def test_permutation_is_a_bijection_for_any_size_and_seed(n: int, seed: int) -> None:
    image = permute(np.arange(n), n, keys(8, "any", seed))
    assert np.bincount(image, minlength=n).tolist() == [1] * n


def test_seed_and_epoch_do_not_add_up() -> None:
    first = permute(np.arange(1000), 1000, keys(8, "windows", 0, 1))
    second = permute(np.arange(1000), 1000, keys(8, "windows", 1, 0))
    assert (first != second).any()
    assert (keys(4, "ab", "c") != keys(4, "a", "bc")).all()


def test_neighbours_are_uncorrelated() -> None:
    n = 1_000_000
    image = permute(np.arange(n), n, keys(8, "quality", 0)).astype(np.float64)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.005  # σ = 0.001 for i.i.d.


def test_neighbour_differences_are_uniform() -> None:
    n = 1_000_000
    image = permute(np.arange(n), n, keys(8, "quality", 1))
    bins = np.bincount(np.diff(image) % n * 1000 // n, minlength=1000)
    chi2 = ((bins - n / 1000) ** 2 / (n / 1000)).sum() / 999
    assert 0.8 < chi2 < 1.2  # σ = 0.045


def test_batch_means_vary_as_if_independent() -> None:
    n, batch = 1 << 20, 512
    image = permute(np.arange(n), n, keys(8, "quality", 2)).astype(np.float64)
    variance = image.reshape(-1, batch).mean(axis=1).var()
    assert 0.88 < variance / (n * n / 12 / batch) < 1.12  # σ = 0.031


def test_all_orders_of_five_are_equally_likely() -> None:
    counts = dict.fromkeys(itertools.permutations(range(5)), 0)
    trials = 1800
    for seed in range(trials):
        counts[tuple(permute(np.arange(5), 5, keys(8, "five", seed)).tolist())] += 1
    expected = trials / 120
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values()) / 119
    assert min(counts.values()) > 0
    assert chi2 < 1.6  # σ = 0.13


WEIGHTS = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)


@given(weights=WEIGHTS, seed=st.integers(0, 99), n=st.integers(1, 500))
def test_mixture_visits_each_source_in_order_without_gaps(
    weights: list[int], seed: int, n: int
) -> None:
    mixture = Mixture([Phase(start=0, weights=tuple(weights))], seed)
    source, index = mixture.locate(np.arange(n))
    for number in range(len(weights)):
        assert index[source == number].tolist() == list(range((source == number).sum()))
    assert mixture.counts(n).tolist() == np.bincount(source, minlength=len(weights)).tolist()


@pytest.mark.parametrize("weights", [(83, 17), (15, 3, 2), (1, 1, 1), (0, 5, 7, 0, 1)])
def test_slots_go_to_the_largest_deficit(weights: tuple[int, ...]) -> None:
    block = Mixture([Phase(start=0, weights=weights)], 0)._blocks[0]
    total, taken = sum(weights), np.zeros(len(weights), dtype=np.int64)
    for slot, source in enumerate(block._table.tolist()):
        assert source == np.argmax((slot + 1) * np.array(weights) - total * taken)
        assert (block._prefix[:, slot] == taken).all()
        taken[source] += 1


@given(weights=WEIGHTS, seed=st.integers(0, 99))
def test_mixture_counts_are_exact_at_every_prefix(weights: list[int], seed: int) -> None:
    total = sum(weights)
    source, _ = Mixture([Phase(start=0, weights=tuple(weights))], seed).locate(np.arange(3 * total))
    prefix = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    share = np.arange(1, 3 * total + 1)[:, None] * np.array(weights) / total
    assert np.abs(prefix - share).max() <= 2
    assert (prefix[total - 1 :: total] == np.outer([1, 2, 3], weights)).all()


def test_mixture_does_not_alias_with_ranks() -> None:
    # 100 slots a block and a global batch of 100 over 4 ranks: without rotation, rank 0 would
    # see the same sources for ever.
    source, _ = Mixture([Phase(start=0, weights=(83, 17))], "ranks").locate(np.arange(100_000))
    share = source.reshape(1000, 4, 25).mean(axis=(0, 2))
    assert np.abs(share - 0.17).max() < 0.01
    first = source.reshape(1000, 100)[:, 0].mean()
    assert 0.12 < first < 0.22


@given(seed=st.integers(0, 99), border=st.integers(1, 300), n=st.integers(1, 600))
def test_phases_carry_counts_over(seed: int, border: int, n: int) -> None:
    phases = [Phase(start=0, weights=(83, 17, 0)), Phase(start=border, weights=(1, 1, 2))]
    mixture = Mixture(phases, seed)
    source, index = mixture.locate(np.arange(n))
    for number in range(3):
        assert index[source == number].tolist() == list(range((source == number).sum()))
    assert mixture.counts(n).tolist() == np.bincount(source, minlength=3).tolist()
    assert 2 not in source[:border]


GOLDEN_KEYS = [
    "0x4114b70e19fedccb",
    "0x107175eba31fad97",
    "0x1611751b7fd25009",
    "0xc5e4f35fb35f2151",
    "0xd577cde09f1801cf",
]
GOLDEN_TEN = [5, 9, 3, 6, 8, 1, 0, 4, 7, 2]
GOLDEN_MILLION = [64890, 114816, 553543, 617815]
GOLDEN_HUGE = [1082133019517, 789736971298, 1277828907120]
GOLDEN_SOURCES = [0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 1, 0, 0, 2, 0, 0]
GOLDEN_INDEXES = [0, 1, 2, 0, 3, 4, 0, 5, 6, 7, 8, 1, 9, 10, 11, 1, 12, 13, 2, 14, 15, 2, 16, 17]
