"""The statistics of a study against textbook values, exact cases, and simulated studies."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matilda_train.ablation.distributions import f_tail, t_quantile, t_two_sided
from matilda_train.ablation.significance import (
    _holm,
    _own_noise_p,
    compare_rows,
    pooled_noise,
    steps_saved,
)


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062047), (2, 4.3026527), (4, 2.7764451), (18, 2.1009220), (1000, 1.96234)]
)
def test_t_quantiles_are_the_tables(df: int, t: float) -> None:
    assert t_quantile(0.95, df) == pytest.approx(t, rel=1e-6)
    assert t_two_sided(t, df) == pytest.approx(0.05, rel=1e-5)


@pytest.mark.parametrize(
    ("f", "above", "below", "p"),
    [(3.8853, 2, 12, 0.05), (6.9266, 2, 12, 0.01), (161.448, 1, 1, 0.05), (1.0, 7, 7, 0.5)],
)
def test_f_tails_are_the_tables(f: float, above: int, below: int, p: float) -> None:
    assert f_tail(f, above, below) == pytest.approx(p, rel=1e-4)


@given(t=st.floats(0.01, 50), df=st.integers(1, 200))
def test_t_squared_is_f(t: float, df: int) -> None:
    assert t_two_sided(t, df) == pytest.approx(f_tail(t * t, 1, df), rel=1e-9)


@pytest.mark.parametrize(
    ("p_values", "accepted"),
    [
        ([0.01, 0.02, 0.04], 3),  # Bonferroni's 0.05 / 3 would stop after the first
        ([0.01, 0.03, 0.04], 1),  # 0.03 fails at 0.05 / 2, and what follows fails with it
        ([0.017, 0.001], 2),
        ([0.02, 0.02, 0.02], 0),
        ([0.05], 1),
        ([], 0),
    ],
)
def test_holm_steps_down_through_the_family(p_values: list[float], accepted: int) -> None:
    named = {str(number): p for number, p in enumerate(p_values)}
    assert _holm(named) == set(sorted(named, key=named.__getitem__)[:accepted])


def test_a_row_as_noisy_as_the_others_is_suspected_as_often_as_the_level_says() -> None:
    draw, studies = random.Random(0), 4000
    p_values = [
        _own_noise_p({name: [draw.gauss(0, 1) for _ in range(5)] for name in "abc"}, "a")
        for _ in range(studies)
    ]
    for level in (0.05, 0.2, 0.5):
        found, error = sum(p < level for p in p_values), math.sqrt(studies * level * (1 - level))
        assert abs(found - studies * level) < 4 * error


def table(rows: dict[str, list[float]]) -> dict[str, dict[int, float]]:
    return {name: dict(enumerate(row)) for name, row in rows.items()}


def test_two_rows_are_the_paired_t_test() -> None:
    base, row = [3.10, 3.20, 3.05, 3.15], [3.06, 3.17, 3.03, 3.10]
    (noise,), found = compare_rows(table({"baseline": base, "row": row}), "baseline")
    differences = [y - x for x, y in zip(base, row, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(4)
    assert found["row"].difference == pytest.approx(statistics.fmean(differences))
    assert found["row"].half_width == pytest.approx(t_quantile(0.95, 3) * error)
    assert found["row"].p == pytest.approx(t_two_sided(statistics.fmean(differences) / error, 3))
    assert found["row"].df == 3
    assert noise.paired == pytest.approx(statistics.stdev(differences) / math.sqrt(2))


def test_more_rows_pool_the_residuals_of_rows_and_seeds() -> None:
    # Residuals by hand: rows and columns of zero sum, so means are 0, 1, 2 and the noise is known.
    residuals = [[0.1, -0.1, 0.0], [-0.1, 0.0, 0.1], [0.0, 0.1, -0.1]]
    rows = {
        name: [number + seed + e for seed, e in enumerate(line)]
        for number, (name, line) in enumerate(zip(["baseline", "b", "c"], residuals, strict=True))
    }
    noise = pooled_noise(table(rows), "baseline")
    assert noise.df == 4
    assert noise.paired == pytest.approx(math.sqrt(0.06 / 4))
    _, found = compare_rows(table(rows), "baseline")
    assert found["c"].half_width == pytest.approx(2.7764451 * noise.paired * math.sqrt(2 / 3))


def test_one_seed_claims_nothing() -> None:
    (noise,), found = compare_rows(table({"baseline": [3.0], "row": [2.0]}), "baseline")
    assert (noise.paired, noise.df) == (None, 0)
    assert found["row"].half_width is None
    assert found["row"].verdict == "one seed"


def test_bits_that_repeat_are_no_difference_and_no_division_by_zero() -> None:
    rows = {"baseline": [3.0, 3.5], "again": [3.0, 3.5], "moved": [2.75, 3.25]}
    _, found = compare_rows(table(rows), "baseline")
    assert found["again"].verdict == "within noise"
    assert found["moved"].verdict == "better"


def test_missing_and_diverged_seeds_leave_a_row_its_own_interval() -> None:
    rows = table({"baseline": [3.0, 3.1, 3.2], "whole": [3.0, 3.11, 3.2], "cut": [2.9, 3.01]})
    _, found = compare_rows(rows, "baseline")
    assert not found["whole"].own_noise
    assert found["cut"].own_noise
    assert found["cut"].df == 1
    assert set(found["cut"].per_seed) == {0, 1}


def test_a_noisy_row_is_judged_by_itself_and_spoils_no_other() -> None:
    draw = random.Random(3)
    rows = {
        f"row{n}": [3 + 0.1 * seed + draw.gauss(0, 0.004) for seed in range(4)] for n in range(6)
    }
    rows["baseline"] = rows.pop("row0")
    calm = pooled_noise(table(rows), "baseline")
    rows["wild"] = [3.5, 2.9, 3.9, 3.2]
    (noise,), found = compare_rows(table(rows), "baseline")
    assert noise == calm
    assert found["wild"].own_noise
    assert found["wild"].half_width is not None
    assert found["wild"].half_width > 10 * (found["row1"].half_width or 0)


def test_a_noisy_baseline_lends_its_noise_to_no_row() -> None:
    draw = random.Random(7)
    rows = {
        f"row{n}": [3 + 0.1 * seed + draw.gauss(0, 0.004) for seed in range(4)] for n in range(6)
    }
    rows["baseline"] = [3.5, 2.9, 3.9, 3.2]
    (noise,), found = compare_rows(table(rows), "baseline")
    assert (noise.paired, noise.rows) == (None, ())
    assert all(row.own_noise and row.verdict == "within noise" for row in found.values())


def test_rows_that_begin_elsewhere_have_a_noise_of_their_own_kind() -> None:
    draw = random.Random(12)

    def row(sigma: float) -> list[float]:
        return [3 + 0.1 * seed + draw.gauss(0, sigma) for seed in range(3)]

    rows = {"baseline": row(0.001)} | {f"near{n}": row(0.001) for n in range(4)}
    rows |= {f"far{n}": row(0.01) for n in range(4)}
    kinds = {name: name.rstrip("0123456789") for name in rows}
    noises, found = compare_rows(table(rows), "baseline", kinds=kinds)
    assert {noise.kind: len(noise.rows) for noise in noises} == {"near": 5, "far": 5}
    assert not any(row.own_noise for row in found.values())
    near, far = found["near1"].half_width, found["far1"].half_width
    assert near is not None
    assert far is not None
    assert far > 4 * near


def simulate(draw: random.Random, effects: dict[str, float], seeds: int, sigma: float) -> object:
    luck = [draw.gauss(0, 0.05) for _ in range(seeds)]
    rows = {
        name: [3 + effect + luck[seed] + draw.gauss(0, sigma) for seed in range(seeds)]
        for name, effect in effects.items()
    }
    return compare_rows(table(rows), "baseline")[1]


def test_intervals_cover_and_equal_rows_are_rarely_called_different() -> None:
    draw, studies = random.Random(20), 400
    effects = {"baseline": 0.0, "a": 0.0, "b": 0.02, "c": -0.01, "d": 0.0}
    covered = false_alarms = 0
    for _ in range(studies):
        found: dict = simulate(draw, effects, 3, 0.005)  # type: ignore[type-arg,assignment]
        row = found["b"]
        covered += abs(row.difference - 0.02) <= row.half_width
        false_alarms += any(found[name].verdict != "within noise" for name in ("a", "d"))
    assert 0.925 < covered / studies < 0.975
    assert false_alarms / studies < 0.065


def test_a_row_that_is_truly_better_is_called_better() -> None:
    draw = random.Random(5)
    effects = {"baseline": 0.0, "same": 0.0, "better": -0.03, "worse": 0.03}
    verdicts = [simulate(draw, effects, 3, 0.005) for _ in range(200)]
    for name in ("better", "worse"):
        assert sum(found[name].verdict == name for found in verdicts) >= 190  # type: ignore[index]


@settings(max_examples=60)
@given(
    losses=st.lists(st.lists(st.floats(2, 5), min_size=3, max_size=3), min_size=2, max_size=6),
    luck=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
)
def test_luck_that_all_rows_of_a_seed_share_changes_nothing(
    losses: list[list[float]], luck: list[float]
) -> None:
    names = ["baseline", *"abcde"]
    rows = dict(zip(names, losses, strict=False))
    moved = {n: [y + c for y, c in zip(row, luck, strict=True)] for n, row in rows.items()}
    before, after = (compare_rows(table(r), "baseline")[1] for r in (rows, moved))
    for name, found in before.items():
        assert after[name].difference == pytest.approx(found.difference, abs=1e-9)
        if not (found.own_noise or after[name].own_noise):
            assert after[name].half_width == pytest.approx(found.half_width, abs=1e-6)


def curve(scale: float, steps: tuple[int, ...] = (10, 20, 40, 80, 160)) -> list[tuple[int, float]]:
    """A loss that falls with the logarithm of the step, reached `scale` times as fast."""
    return [(step, 6 - 0.5 * math.log(scale * step)) for step in steps]


@pytest.mark.parametrize("scale", [1.0, 1.25, 2.0, 3.7])
def test_tokens_saved_are_exact_for_losses_that_fall_with_the_logarithm(scale: float) -> None:
    better = steps_saved(curve(1.0), curve(scale))
    worse = steps_saved(curve(scale), curve(1.0))
    assert better is not None
    assert worse is not None
    assert better.fraction == pytest.approx(1 - 1 / scale)
    assert worse.fraction == pytest.approx(1 - scale)
    assert not better.bound
    assert not worse.bound


def test_an_evaluation_before_the_first_step_is_no_point_of_a_curve() -> None:
    slow, quick = [(0, 5.0), (100, 3.0), (200, 2.0)], [(0, 5.0), (100, 1.9), (200, 1.5)]
    saved, needed = steps_saved(slow, quick), steps_saved(quick, slow)
    assert saved is not None
    assert needed is not None
    assert (saved.fraction, saved.bound) == (0.5, True)
    assert (needed.fraction, needed.bound) == (-1.0, True)
    assert steps_saved(slow[:2], quick[:2]) is None


def test_tokens_saved_beyond_the_curves_are_a_bound_and_without_curves_none() -> None:
    saved = steps_saved(curve(1.0), curve(100.0))
    assert saved is not None
    assert saved.bound
    assert saved.fraction == pytest.approx(1 - 10 / 160)
    assert steps_saved([(0, 6.0)], [(0, 6.0)]) is None
    assert steps_saved(curve(1.0, (10,)), curve(2.0, (10,))) is None
    assert steps_saved(curve(1.0, (10, 20)), curve(1.0, (20, 40))) is None
