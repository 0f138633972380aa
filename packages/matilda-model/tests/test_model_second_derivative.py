"""A second derivative is right or refused, and nothing that trains meets the refusal."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.func import functional_call, grad, hessian, jvp
from torch.utils.checkpoint import checkpoint

import matilda_model
from matilda_model import ModelConfig, Transformer, linear_cross_entropy

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=8,
    mlp="relu2", logit_softcap=5.0, z_loss=1e-3,
)  # fmt: skip


def case() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    h = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    return h, w, torch.tensor([3, -1, 8, 0, -100, 2, 2])


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.filterwarnings("ignore")  # torch warns of its own interfaces here
def test_the_plain_loss_has_the_second_derivative_of_its_formula() -> None:
    h, w, targets = case()

    def plain(h: Tensor) -> Tensor:
        out = linear_cross_entropy(h, w, targets, softcap=5.0, z_loss=1e-2, backend="plain")
        return out.loss.double()

    def formula(h: Tensor) -> Tensor:
        logits = 5.0 * torch.tanh(h @ w.T / 5.0)
        lse, valid = logits.logsumexp(-1), targets >= 0
        picked = logits.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
        return ((lse - picked + 1e-2 * lse.square()) * valid).sum() / valid.sum()

    expected = hessian(formula)(h)
    got = torch.autograd.functional.hessian(plain, h)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(hessian(plain)(h), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch warns of its own interfaces here
def test_the_eager_back_ends_have_a_hessian_vector_product() -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    model.choose_backends(loss="plain", attention="math", matmul="plain", norm="plain")
    weights = dict(model.named_parameters())
    v = {name: torch.randn_like(weight) for name, weight in weights.items()}
    inputs, targets = batch()

    def gradient(at: dict[str, Tensor]) -> dict[str, Tensor]:
        def loss(at: dict[str, Tensor]) -> Tensor:
            out: Tensor = functional_call(model, at, (inputs, targets)).loss
            return out

        return grad(loss)(at)

    slopes = torch.autograd.grad(model(*batch()).loss, list(weights.values()), create_graph=True)
    along = sum((slope * v[name]).sum() for name, slope in zip(weights, slopes, strict=True))
    product = torch.autograd.grad(along, list(weights.values()))
    _, expected = jvp(gradient, (weights,), (v,))
    for name, got in zip(weights, product, strict=True):
        torch.testing.assert_close(got, expected[name], rtol=1e-3, atol=1e-4)


def test_the_chunked_loss_refuses_a_second_derivative() -> None:
    h, w, targets = case()
    loss = linear_cross_entropy(h, w, targets, backend="chunked").loss
    with pytest.raises(RuntimeError, match=r'second derivatives .* choose `loss` "plain"'):
        torch.autograd.grad(loss, (h, w), create_graph=True)
    torch.autograd.grad(loss, (h, w))


def test_every_gradient_of_our_own_refuses_a_second_derivative() -> None:
    pytest.importorskip("triton", reason="needs triton, which torch brings on Linux x86-64")
    names = [module.name for module in pkgutil.iter_modules(matilda_model.__path__)]
    modules = [importlib.import_module(f"matilda_model.{name}") for name in names]
    functions = {
        member
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, torch.autograd.Function)
    }
    assert len(functions) >= 11
    for function in functions:
        gradients = len(inspect.signature(function.backward).parameters) - 1
        with pytest.raises(RuntimeError, match='choose `loss` "plain"'):
            function.backward(SimpleNamespace(), *[torch.ones(())] * gradients)


def gradients(model: Transformer, run: Any) -> list[Tensor]:
    model.zero_grad()
    run(*batch()).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.filterwarnings("ignore")  # torch warns of its own interfaces here
@pytest.mark.parametrize(
    "way", ["blocks", "blocks, reentrant", "all", "all, reentrant", "compiled"]
)
def test_training_never_meets_the_refusal(way: str) -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    expected = gradients(model, model)
    torch.compiler.reset()
    run: Any = model
    if way.startswith("blocks"):
        for block in model.blocks:
            inner = block.forward
            block.forward = lambda *a, inner=inner: checkpoint(
                inner, *a, use_reentrant="reentrant" in way
            )
    elif way.startswith("all"):
        # the loss of our own within what is computed anew; a reentrant one needs a first gradient
        head, reentrant = model._head_weight, "reentrant" in way

        def run(inputs: Tensor, targets: Tensor) -> Any:
            def tail(h: Tensor, weight: Tensor) -> Tensor:
                return linear_cross_entropy(
                    h, weight, targets.flatten(), softcap=5.0, z_loss=1e-3, backend="chunked"
                ).loss

            h = model.hidden(inputs).flatten(0, 1)
            return SimpleNamespace(loss=checkpoint(tail, h, head, use_reentrant=reentrant))

    elif way == "compiled":
        run = torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)
    got = gradients(model, run)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch warns of its own interfaces here
def test_compiled_autograd_never_meets_the_refusal() -> None:
    h, w, targets = case()
    expected = torch.autograd.grad(linear_cross_entropy(h, w, targets).loss, (h, w))
    captures = torch._dynamo.utils.counters["compiled_autograd"]
    captures.clear()
    loss = linear_cross_entropy(h, w, targets).loss
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    assert captures["captures"] == 1
    for leaf, gradient in zip((h, w), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
