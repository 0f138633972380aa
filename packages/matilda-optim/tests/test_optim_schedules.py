"""Schedules: values, phases and refusals."""

from __future__ import annotations

import runpy
from itertools import pairwise
from pathlib import Path

import pytest

from matilda_optim import constant, cosine, linear_to_zero, momentum_warmup, wsd


def test_wsd_has_three_phases() -> None:
    values = [wsd(s, total_steps=100, warmup_steps=10, decay_steps=20) for s in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert all(a < b for a, b in pairwise(values[:10]))
    assert values[9:81] == [1.0] * 72
    assert all(a > b for a, b in pairwise(values[80:]))
    assert values[90] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.05)
    assert values[100] == 0.0


@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine", "exponential", "power"])
def test_every_decay_shape_starts_at_one_falls_and_ends_at_final(shape: str) -> None:
    values = [
        wsd(s, total_steps=50, warmup_steps=0, decay_steps=50, shape=shape, final=0.01)
        for s in range(51)
    ]
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.01)
    assert all(a > b for a, b in pairwise(values))


def test_an_exponential_decay_ends_at_its_final_value_however_small() -> None:
    for final, end in ((1e-5, 1e-5), (0.0, 1e-3)):
        phases = {"total_steps": 10, "warmup_steps": 0, "decay_steps": 5, "final": final}
        assert wsd(10, **phases, shape="exponential") == pytest.approx(end)  # type: ignore[arg-type]


def test_phases_of_no_steps_are_left_out() -> None:
    assert [wsd(s, total_steps=3, warmup_steps=0, decay_steps=0) for s in range(4)] == [1, 1, 1, 0]
    assert [cosine(s, total_steps=2, warmup_steps=2) for s in range(4)] == [0.5, 1.0, 0.1, 0.1]
    assert momentum_warmup(0, warmup_steps=0) == 0.95


def test_cosine_and_linear_reach_their_final_value_and_hold_it() -> None:
    assert cosine(0, total_steps=100, warmup_steps=4) == 0.25
    assert cosine(4, total_steps=100, warmup_steps=4) == 1.0
    assert cosine(52, total_steps=100, warmup_steps=4) == pytest.approx(0.55)
    assert cosine(100, total_steps=100, warmup_steps=4) == pytest.approx(0.1)
    assert cosine(500, total_steps=100, warmup_steps=4) == pytest.approx(0.1)
    assert linear_to_zero(50, total_steps=100) == 0.5
    assert linear_to_zero(100, total_steps=100) == 0.0


def test_warm_up_is_never_zero_and_constant_stays_at_one() -> None:
    assert constant(0, warmup_steps=3) == pytest.approx(1 / 3)
    assert constant(2, warmup_steps=3) == 1.0
    assert constant(10**9) == 1.0


def test_phases_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        wsd(0, total_steps=10, warmup_steps=6, decay_steps=5)
    with pytest.raises(ValueError, match="`shape`"):
        wsd(0, total_steps=10, warmup_steps=1, decay_steps=5, shape="round")
    with pytest.raises(ValueError, match="`step`"):
        cosine(-1, total_steps=10)
    with pytest.raises(ValueError, match="`warmup_steps`"):
        cosine(0, total_steps=10, warmup_steps=11)
    with pytest.raises(ValueError, match="`warmup_steps` must be at least 0"):
        constant(0, warmup_steps=-1)
    with pytest.raises(ValueError, match="`power`"):
        wsd(0, total_steps=10, warmup_steps=1, decay_steps=5, shape="power", power=0.0)
    with pytest.raises(ValueError, match="`final`"):
        linear_to_zero(0, total_steps=10, final=2.0)


def test_the_figure_of_the_readme_shows_these_schedules() -> None:
    folder = Path(__file__).parents[1] / "docs"
    drawn = runpy.run_path(str(folder / "draw.py"))["schedules"]()
    assert drawn == (folder / "schedules.svg").read_text()
