"""Numerical properties of the orthogonalisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matilda_optim import orthogonalize, resolve_coefficients

SHAPES = [(64, 64), (32, 128), (128, 32), (48, 80), (17, 33)]


def exact(matrix: Tensor, preset: str = "polar_express") -> Tensor:
    """The same polynomial on the singular values, in float64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s)
    for a, b, c in resolve_coefficients(preset, 5):
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vt


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-4), (torch.float16, 1.5e-2), (torch.bfloat16, 8e-2)],
)
def test_iterations_match_the_float64_polynomial(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    g = gaussian(*shape)
    out = orthogonalize(g, dtype=dtype).double()
    want = exact(g)
    assert (out - want).norm() / want.norm() < tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_of_a_gaussian_are_near_one_by_svd(shape: tuple[int, int]) -> None:
    sigma = torch.linalg.svdvals(orthogonalize(gaussian(*shape)).double())
    assert sigma.max() < 1.14
    assert sigma[sigma > 0.5].min() > 0.86
    assert (sigma > 0.86).float().mean() > 0.9


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_steep_spectra_stay_accurate_in_fp32_and_the_gram_form(power: float) -> None:
    u = torch.linalg.qr(gaussian(64, 64).double()).Q
    v = torch.linalg.qr(gaussian(256, 64, seed=1).double()).Q
    s = torch.arange(1, 65, dtype=torch.float64) ** -power
    g = ((u * s) @ v.T).float()
    want = exact(g)
    assert (orthogonalize(g).double() - want).norm() / want.norm() < 5e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [-100, -17, 1, 60, 120])  # at 120 a square overflows
def test_powers_of_two_change_no_bit(shape: tuple[int, int], k: int) -> None:
    g = gaussian(*shape)
    assert torch.equal(orthogonalize(g * 2.0**k), orthogonalize(g))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_any_scale_gives_the_same_direction(scale: float) -> None:
    g = gaussian(32, 64)
    torch.testing.assert_close(orthogonalize(g * scale), orthogonalize(g), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] != s[1]])
def test_transposing_the_input_transposes_the_output_bitwise(shape: tuple[int, int]) -> None:
    g = gaussian(*shape)
    assert torch.equal(orthogonalize(g.T), orthogonalize(g).T)


def test_rotating_both_sides_rotates_the_output() -> None:
    g = gaussian(48, 96)
    u = torch.linalg.qr(gaussian(48, 48, seed=1)).Q
    v = torch.linalg.qr(gaussian(96, 96, seed=2)).Q
    torch.testing.assert_close(
        orthogonalize(u @ g @ v), u @ orthogonalize(g) @ v, rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [2, 5, 36])
def test_a_matrix_alone_equals_itself_inside_a_batch_bitwise(
    shape: tuple[int, int], batch: int
) -> None:
    g = gaussian(batch, *shape)
    out = orthogonalize(g)
    for i in (0, batch // 2, batch - 1):
        assert torch.equal(out[i], orthogonalize(g[i]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_element_touches_only_its_matrix(value: float) -> None:
    g = gaussian(4, 24, 40)
    clean = orthogonalize(g)
    g[2, 3, 5] = value
    out = orthogonalize(g)
    assert out[2].isnan().any()
    for i in (0, 1, 3):
        assert torch.equal(out[i], clean[i])


def test_zero_matrices_give_zeros_and_empty_ones_pass() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 8, 16)), torch.zeros(2, 8, 16))
    assert orthogonalize(torch.zeros(0, 16)).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_degenerate_matrices_stay_bounded(dtype: torch.dtype) -> None:
    one_hot = torch.zeros(32, 64)
    one_hot[3, 5] = 7.0
    hot_row = torch.zeros(32, 64)
    hot_row[3] = gaussian(64)
    cases = {
        "rank 1": gaussian(32, 1) @ gaussian(1, 64, seed=1),
        "rank 8": gaussian(32, 8) @ gaussian(8, 64, seed=1),
        "one hot": one_hot,
        "one row": hot_row,
        "equal rows": gaussian(1, 64).expand(32, 64),
        "a row": gaussian(1, 40),
        "a column": gaussian(40, 1),
    }
    for name, g in cases.items():
        sigma = torch.linalg.svdvals(orthogonalize(g, dtype=dtype).double())
        assert 0.85 < sigma[0] < 1.15, name


def test_input_is_never_written() -> None:
    for shape in SHAPES:
        g = gaussian(*shape)
        before = g.clone()
        orthogonalize(g)
        assert torch.equal(g, before)


def test_a_parameter_gives_what_its_values_give() -> None:
    for shape in SHAPES:
        g = gaussian(*shape)
        out = orthogonalize(torch.nn.Parameter(g))
        assert torch.equal(out, orthogonalize(g))
        assert not out.requires_grad


def test_one_dimension_and_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        orthogonalize(torch.ones(3))
    with pytest.raises(ValueError, match=r"a floating dtype, got torch\.int64"):
        orthogonalize(torch.ones(3, 3, dtype=torch.int64))
