"""Random shapes, dtypes, strides and degenerate values."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from matilda_optim import Muon, orthogonalize

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIDES = st.integers(1, 40)
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """A matrix of any shape, dtype and stride, sometimes of low rank, zero, or huge."""
    rows, cols, dtype = draw(SIDES), draw(SIDES), draw(DTYPES)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["gaussian", "rank 1", "zero", "one entry", "equal"]))
    x = torch.randn(rows, cols, generator=g)
    if kind == "rank 1":
        x = torch.randn(rows, 1, generator=g) @ torch.randn(1, cols, generator=g)
    elif kind == "zero":
        x = torch.zeros(rows, cols)
    elif kind == "one entry":
        x = torch.zeros(rows, cols)
        x[rows // 2, cols // 2] = 1.0
    elif kind == "equal":
        x = torch.ones(rows, cols)
    if dtype == torch.float32:
        x = x * 2.0 ** draw(st.integers(-90, 90))
    x = x.to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        return x.repeat_interleave(2, dim=1)[:, ::2]
    return x


@QUICK
@given(matrices())
def test_singular_values_never_exceed_the_band(x: Tensor) -> None:
    out = orthogonalize(x)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    sigma = torch.linalg.svdvals(out.double())
    assert sigma[0] < 1.15
    if x.any():
        assert sigma[0] > 0.85
    else:
        assert not out.any()


@settings(QUICK, max_examples=25)
@given(matrices(), st.floats(0, 0.99), st.booleans(), st.booleans(), st.booleans())
def test_a_step_is_finite_decoupled_and_repeatable(
    grad: Tensor, momentum: float, nesterov: bool, cautious: bool, maximize: bool
) -> None:
    results = []
    for _ in range(2):
        p = nn.Parameter(torch.ones(grad.shape, dtype=grad.dtype))
        p.grad = grad
        options = {"momentum": momentum, "nesterov": nesterov, "maximize": maximize}
        optimizer = Muon([p], lr=0.01, cautious=cautious, **options)
        for _ in range(2):
            optimizer.step()
        assert p.isfinite().all()
        assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
        results.append(p.detach())
    assert torch.equal(*results)
    if not grad.any() and not cautious and grad.dtype == torch.float32:
        torch.testing.assert_close(results[0], torch.full_like(results[0], 0.999**2))


@QUICK
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=6), st.integers(0, 5))
def test_each_parameter_moves_as_if_it_were_alone(shapes: list[tuple[int, int]], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    start = [torch.randn(s, generator=g) for s in shapes]
    grads = [torch.randn(s, generator=g) for s in shapes]
    together = [nn.Parameter(t.clone()) for t in start]
    for p, grad in zip(together, grads, strict=True):
        p.grad = grad
    Muon(together, lr=0.1).step()
    for p, t, grad in zip(together, start, grads, strict=True):
        alone = nn.Parameter(t.clone())
        alone.grad = grad
        Muon([alone], lr=0.1).step()
        assert torch.equal(p, alone)
