"""The frozen coefficients equal what the Polar Express generator gives, and do what they state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from matilda_optim import PRESETS, resolve_coefficients


def optimal_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The odd quintic closest to 1 on [low, high], by Remez exchange."""
    inner, outer = (3 * low + high) / 4, (low + 3 * high) / 4
    error, previous = math.inf, None
    while previous is None or abs(previous - error) > 1e-15:
        previous = error
        rows = [
            [x, x**3, x**5, sign]
            for x, sign in ((low, 1.0), (inner, -1.0), (outer, 1.0), (high, -1.0))
        ]
        a, b, c, error = torch.linalg.solve(
            torch.tensor(rows, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        ).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = math.sqrt((-3 * b - root) / (10 * c))
        outer = math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def polar_express(
    low: float, steps: int, safety: float, cushion: float = 0.02
) -> list[tuple[float, float, float]]:
    """Amsel et al., algorithm 1, with the safety factor on all polynomials but the last."""
    high = 1.0
    out = []
    for i in range(steps):
        a, b, c = optimal_quintic(max(low, cushion * high), high)
        at_low = a * low + b * low**3 + c * low**5
        at_high = a * high + b * high**3 + c * high**5
        centre = 2 / (at_low + at_high)
        a, b, c = a * centre, b * centre, c * centre
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
        f = 1 + safety if i < steps - 1 else 1.0
        out.append((a / f, b / f**3, c / f**5))
    return out


def evaluate(quintics: tuple[tuple[float, float, float], ...], sigma: Tensor) -> Tensor:
    for a, b, c in quintics:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


@pytest.mark.parametrize(
    ("name", "low", "steps"),
    [("polar_express", 1e-3, 5), ("polar_express_tight", 2e-3, 5), ("polar_express_4", 5e-3, 4)],
)
def test_frozen_coefficients_equal_the_generators(name: str, low: float, steps: int) -> None:
    frozen = torch.tensor(PRESETS[name], dtype=torch.float64)
    made = torch.tensor(polar_express(low, steps, safety=0.005), dtype=torch.float64)
    torch.testing.assert_close(frozen, made, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "low", "band"),
    [
        ("polar_express", 1e-3, 0.134),
        ("polar_express_tight", 3e-3, 0.025),
        ("polar_express_4", 1e-2, 0.089),
        ("keller", 1e-2, 0.319),
    ],
)
def test_singular_values_end_inside_the_stated_band(name: str, low: float, band: float) -> None:
    steps = 4 if name.endswith("4") else 5
    sigma = torch.logspace(math.log10(low), 0, 100_001, dtype=torch.float64)
    out = evaluate(resolve_coefficients(name, steps), sigma)
    assert (out - 1).abs().max() <= band


@pytest.mark.parametrize("name", list(PRESETS))
def test_no_preset_blows_up_when_rounding_lifts_sigma_above_one(name: str) -> None:
    over = torch.tensor([1 + 2**-9, 1 + 2**-8], dtype=torch.float64)
    assert evaluate(resolve_coefficients(name, len(PRESETS[name]) or 5), over).abs().max() < 1.3


def test_one_tuple_repeats_and_a_short_list_repeats_its_last() -> None:
    assert resolve_coefficients((1.0, 2.0, 3.0), 2) == ((1.0, 2.0, 3.0),) * 2
    assert resolve_coefficients([[1, 2, 3]] * 2 + [[4, 5, 6]], 4)[2:] == ((4.0, 5.0, 6.0),) * 2
    assert len(resolve_coefficients("polar_express", 3)) == 3


@pytest.mark.parametrize("bad", ["nope", (1.0, 2.0), [(1.0, 2.0)], []])
def test_bad_coefficients_are_one_sentence(bad: object) -> None:
    with pytest.raises(ValueError, match="`ns_coefficients`"):
        resolve_coefficients(bad, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`ns_steps`"):
        resolve_coefficients("keller", 0)
