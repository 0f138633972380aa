"""The loss back ends against formulas in float64 and against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matilda_model import ModelConfig, Transformer, linear_cross_entropy
from matilda_model import loss as loss_module


def case(n: int = 37, d: int = 16, v: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    h = torch.randn(n, d, requires_grad=True)
    w = torch.randn(v, d, requires_grad=True)
    return h, w, torch.randint(0, v, (n,))


def formula(h: Tensor, w: Tensor, targets: Tensor, softcap: float | None, z: float) -> Tensor:
    logits = h.double() @ w.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.log(torch.exp(logits).sum(-1))
    per_token = lse - logits[torch.arange(len(h)), targets.clamp_min(0)] + z * lse**2
    return per_token[targets >= 0].mean()


@pytest.mark.parametrize("backend", ["plain", "chunked"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss_and_gradients_equal_the_float64_formula(
    backend: str, softcap: float | None, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_TOKENS", 16)  # three chunks, the last one short
    h, w, targets = case()
    expected = formula(h, w, targets, softcap, z_loss)
    dh, dw = torch.autograd.grad(expected, (h, w))
    out = linear_cross_entropy(h, w, targets, softcap=softcap, z_loss=z_loss, backend=backend)
    torch.testing.assert_close(out.loss, expected.float())
    got_h, got_w = torch.autograd.grad(3.0 * out.loss, (h, w))
    torch.testing.assert_close(got_h, 3.0 * dh, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got_w, 3.0 * dw, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_loss_of_each_token_equals_the_float64_formula(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CPU_CHUNK_LOGITS", 16 * 64)  # several chunks
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            vocab_size=64,
            d_model=16,
            n_layers=1,
            n_heads=2,
            n_kv_heads=1,
            max_seq_len=20,
            logit_softcap=softcap,
            z_loss=0.5,
        )
    )
    ids = torch.randint(0, 64, (3, 21))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[1, 3], targets[1, 4] = -1, -100
    losses = model(inputs, targets, per_token=True)
    expected = -model(inputs).double().log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])
    assert losses.shape == targets.shape
    assert losses[1, 3] == losses[1, 4] == 0.0
    assert not losses.requires_grad
    kept = targets >= 0
    torch.testing.assert_close(losses[kept], expected[..., 0][kept].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[kept].mean(), model(inputs, targets).ce)


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_z_loss_equals_cross_entropy_plus_lse_squared(backend: str) -> None:
    h, w, targets = case()
    out = linear_cross_entropy(h, w, targets, z_loss=0.1, backend=backend)
    logits = (h @ w.T).double()
    ce = torch.nn.functional.cross_entropy(logits, targets)
    z = 0.1 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(out.ce, ce.float())
    torch.testing.assert_close(out.z_loss, z.float())
    torch.testing.assert_close(out.loss, (ce + z).float())
    assert not out.ce.requires_grad
    assert not out.z_loss.requires_grad
    assert out.loss.dtype == out.ce.dtype == out.z_loss.dtype == torch.float32


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_soft_cap_bounds_what_the_loss_can_reach(backend: str) -> None:
    h, w, targets = case()
    out = linear_cross_entropy(1e4 * h, w, targets, softcap=2.0, backend=backend)
    assert out.ce <= 4.0 + torch.log(torch.tensor(50.0))
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("backend", ["plain", "chunked"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_ignored_targets_count_for_nothing(backend: str, z_loss: float) -> None:
    h, w, targets = case()
    targets[::3] = -1
    targets[::6] = -100  # torch's own mark of an ignored target
    out = linear_cross_entropy(h, w, targets, softcap=5.0, z_loss=z_loss, backend=backend)
    torch.testing.assert_close(out.loss, formula(h, w, targets, 5.0, z_loss).float())
    (dh,) = torch.autograd.grad(out.loss, h)
    assert (dh[::3] == 0).all()
    nothing = linear_cross_entropy(h, w, torch.full_like(targets, -1), backend=backend)
    assert nothing.loss == 0


def test_chunked_loss_equals_plain_in_bfloat16() -> None:
    h, w, targets = case(n=64, d=64, v=300)
    h = h.detach().bfloat16().requires_grad_()
    results = []
    for backend in ("plain", "chunked"):
        out = linear_cross_entropy(h, w, targets, softcap=30.0, z_loss=1e-4, backend=backend)
        results.append((out.loss, *torch.autograd.grad(out.loss, (h, w))))
    for a, b in zip(*results, strict=True):
        assert (a.double() - b.double()).norm() / a.double().norm() < 1e-2


def test_chunked_loss_without_gradient_keeps_none() -> None:
    h, w, targets = case()
    with torch.no_grad():
        out = linear_cross_entropy(h, w, targets, backend="chunked")
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, formula(h, w, targets, None, 0.0).float().detach())


def test_targets_that_do_not_belong_to_the_tokens_are_refused() -> None:
    h, w, targets = case()
    for backend in ("plain", "chunked"):
        for wrong in (targets[:-1], targets[:1]):  # one target would be broadcast over all rows
            with pytest.raises(ValueError, match="do not fit 37 tokens"):
                linear_cross_entropy(h, w, wrong, backend=backend)
    model = Transformer(
        ModelConfig(vocab_size=50, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=8)
    )
    ids = torch.randint(0, 50, (2, 8))
    with pytest.raises(ValueError, match=r"shape \(8, 2\), `input_ids_BT` \(2, 8\)"):
        model(ids, ids.T)
    with pytest.raises(ValueError, match="give `targets_BT`"):
        model(ids, per_token=True)


def test_an_unknown_or_unusable_back_end_is_refused() -> None:
    h, w, targets = case()
    with pytest.raises(ValueError, match="`backend` must be"):
        linear_cross_entropy(h, w, targets, backend="fast")
    with pytest.raises(ValueError, match="CUDA only"):
        linear_cross_entropy(h, w, targets, backend="liger")
    with pytest.raises(ValueError, match="needs a Hopper or later GPU"):
        linear_cross_entropy(h, w, targets, backend="fused_fp8")
