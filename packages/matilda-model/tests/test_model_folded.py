"""Norms folded into the products around them: the algebra in float64, the kernels on a GPU."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from matilda_model import KernelMismatchError, ModelConfig, Transformer, self_check
from matilda_model.layers import apply_rope
from matilda_model.model import Block

pytest.importorskip("triton", reason="needs triton, which torch brings on Linux x86-64")

CONFIG = ModelConfig(
    vocab_size=96,
    d_model=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    max_seq_len=24,
    mlp="relu2",
    mlp_ratio=2.0,
    norm_eps=1e-2,  # large, so that a term that forgets it shows
    norm="folded",
    loss="plain",
)
needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9),
    reason="needs a Hopper GPU",
)


def error(got: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(got.double() - expected.double())
    return float((difference / torch.linalg.vector_norm(expected.double())).detach())


def normed_and_rotated(
    qkv_BTX: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv_BTX.unflatten(-1, (-1, q_weight.shape[0]))
    q, k, v = heads.split([n_heads, n_kv_heads, n_kv_heads], dim=2)
    q, k = (
        apply_rope(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight, cos, sin)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result and, in place of the log-sum-exp, all probabilities [B, H, T, T]."""
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bthe,bshe->bhts", q, k.repeat_interleave(group, 2)) / q.shape[3] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", p, v.repeat_interleave(group, 2)), p


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, p: Tensor
) -> tuple[Tensor, ...]:
    kv, group, scale = k.shape[2], q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    dp = torch.einsum("bthe,bshe->bhts", dout, v)
    ds = p * (dp - (dout * out).sum(-1).transpose(1, 2)[..., None]) * scale
    dk, dv = torch.einsum("bhts,bthe->bshe", ds, q), torch.einsum("bhts,bthe->bshe", p, dout)
    dk, dv = (x.unflatten(2, (kv, group)).sum(3) for x in (dk, dv))
    return torch.einsum("bhts,bshe->bthe", ds, k), dk, dv


def backward_folded(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv, qkv, q_weight, k_weight, cos, sin, eps, scale = arguments
    d = [dq, dk, dv]
    heads = qkv.unflatten(-1, (-1, q_weight.shape[0]))
    parts = list(heads.split([x.shape[2] for x in d], dim=2))
    dweight = []
    for i, weight in enumerate((q_weight, k_weight)):
        rstd = torch.rsqrt(parts[i].square().mean(-1, keepdim=True) + eps)
        normed = parts[i] * rstd
        dnormed = apply_rope(d[i], cos, -sin)
        dweight.append((dnormed * normed).sum((0, 1, 2)))
        dnormed = dnormed * weight
        d[i] = rstd * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    dqkv = torch.cat(d, dim=2)
    dots_JN = (dqkv * heads).sum(-1).flatten(0, 1).T
    return dqkv.flatten(2) * scale.view(*qkv.shape[:2], 1), torch.stack(dweight), dots_JN


@pytest.fixture
def plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator by torch's own arithmetic, in the dtype of its inputs, on any device."""
    from matilda_model import quack_folded, triton_qkv, triton_qkv_tiles

    def linear_add_squares(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = residual + x @ weight.T
        return y, y.square().unflatten(1, (2, -1)).sum(-1)

    def scaled_relu2_backward(
        dy: Tensor, down: Tensor, h: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        du = (dy @ down) * 2 * h.sqrt()
        return du * scale[:, None], (du * h.sqrt() / 2).unflatten(1, (3, -1)).sum(-1)

    replaced = {
        "quack_product": lambda a, b: a @ b,
        "scaled_product": lambda a, b, scale: scale[:, None] * (a @ b),
        "scaled_up_relu2": lambda x, up, scale: torch.relu(scale[:, None] * (x @ up.T)).square(),
        "linear_add_squares": linear_add_squares,
        "scaled_relu2_backward": scaled_relu2_backward,
        "norm_gradient": lambda dz, weight, past, x, along: dz @ weight + past + along[:, None] * x,
        "fa4_forward": attention,
        "fa4_backward_tiled": attention_backward,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(quack_folded, name, function)
    monkeypatch.setattr(triton_qkv, "qk_norm_rope", lambda *a: normed_and_rotated(*a)[:2])
    monkeypatch.setattr(triton_qkv_tiles, "qkv_norm_rope_backward_folded", backward_folded)


def loss_and_gradients(model: Transformer, run: Callable[..., Any]) -> list[Tensor]:
    ids = torch.randint(0, 96, (2, 25), generator=torch.Generator().manual_seed(1))
    loss = run(ids[:, :-1], ids[:, 1:]).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def model_in_float64(config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).double()
    model.compute_dtype = torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.usefixtures("plain_operators")
@pytest.mark.parametrize("scalars", [False, True], ids=["", "residual scalars"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_folded_model_is_the_model(
    scalars: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:

    model = model_in_float64(dataclasses.replace(CONFIG, residual_scalars=scalars))
    expected = loss_and_gradients(model, model)
    folded: list[Tensor] = []
    monkeypatch.setattr(Block, "folds", lambda self, x: folded.append(x) is None)
    if compiled:
        monkeypatch.setattr(Block, "folds", lambda self, x: True)
        torch.compiler.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    got = loss_and_gradients(model, run)
    assert compiled or len(folded) == 3
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, a, b in zip(names, got, expected, strict=True):
        assert error(a, b) < 1e-5, name  # RoPE's table and the loss are float32


@pytest.mark.usefixtures("plain_operators", "one_process")
@pytest.mark.filterwarnings("ignore")  # torch warns of its own interfaces here
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_folded_model_is_the_model_in_a_wrapper_with_compiled_blocks(
    wrapper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_in_float64()
    expected = loss_and_gradients(model, model)
    monkeypatch.setattr(Block, "folds", lambda self, x: True)
    torch.compiler.reset()
    run: torch.nn.Module
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager")
        if wrapper == "fsdp2":
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    if wrapper == "fsdp2":
        run = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    else:
        run = DistributedDataParallel(model)
    ids = torch.randint(0, 96, (2, 25), generator=torch.Generator().manual_seed(1))
    loss = run(ids[:, :-1], ids[:, 1:]).loss
    loss.backward()
    assert error(loss, expected[0]) < 1e-5
    for (name, parameter), b in zip(model.named_parameters(), expected[1:], strict=True):
        grad = parameter.grad
        assert grad is not None
        assert error(grad.full_tensor() if isinstance(grad, DTensor) else grad, b) < 1e-5, name


@pytest.mark.usefixtures("plain_operators")
def test_the_self_check_compares_a_folded_block_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from matilda_model import quack_folded

    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(CONFIG, norm="auto"))
    monkeypatch.setattr(
        Block, "folds", lambda self, x: self.may_fold and self.norm_backend == "auto"
    )
    ids = torch.randint(0, 96, (2, 25))
    rows = self_check(model, ids[:, :-1], ids[:, 1:])
    assert all(row.ok for row in rows)
    assert [row.kernel for row in rows] == ["norm"] * 8 + ["loss"] * 3

    forgetful = quack_folded.norm_gradient
    monkeypatch.setattr(quack_folded, "norm_gradient", lambda *a: forgetful(*a[:4], 0 * a[4]))
    with pytest.raises(KernelMismatchError, match=r"`norm` .* of a folded block's input is off"):
        self_check(model, ids[:, :-1], ids[:, 1:])
    rows = self_check(model, ids[:, :-1], ids[:, 1:], fall_back=True)
    assert model.config.norm == "plain"
    assert {row.kernel for row in rows} == {"norm", "attention", "matmul", "loss"}


def test_hooks_see_every_module_while_norms_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(CONFIG)
    block = model.blocks[0]
    assert isinstance(block, Block)
    monkeypatch.setattr(type(block.attn), "joins", lambda self, x: True)
    monkeypatch.setattr(type(block.attn), "takes_quack", lambda self, x, *names: True)
    monkeypatch.setattr(type(block.mlp), "kind", lambda self, x: "quack_all")
    x = torch.zeros(1, 2, 48)
    assert block.folds(x)
    with model.norms_apart():
        assert not block.folds(x)
    assert block.folds(x)
    model.choose_backends(norm="fused")
    assert not block.folds(x)


@needs_hopper
@pytest.mark.gpu
def test_folded_products_equal_float64_on_the_gpu() -> None:
    pytest.importorskip("quack", reason="needs the quack-kernels package")
    from matilda_model.quack_folded import FoldedReLU2, scaled_product

    torch.manual_seed(0)
    for n, d, f in ((520, 256, 768), (1024, 768, 3072)):
        x, up, down, dy = (
            (scale * torch.randn(*shape, device="cuda")).bfloat16().requires_grad_()
            for scale, shape in (
                (3.0, (n, d)),
                (0.1, (f, d)),
                (0.1, (d, f)),
                (1.0, (n, d)),
            )
        )
        eps = 0.5
        exact = [leaf.detach().double().requires_grad_() for leaf in (x, up, down)]
        factor = torch.rsqrt(exact[0].square().mean(1, keepdim=True) + eps)
        u = factor * exact[0] @ exact[1].T
        expected = exact[0] + torch.relu(u).square() @ exact[2].T
        squares = x.detach().float().square().sum(1)
        y, after = FoldedReLU2.apply(x, squares, up, down, eps)
        assert error(y, expected) < 5e-3
        assert error(after, expected.square().sum(1)) < 1e-3
        assert not after.requires_grad
        for got, want in zip(
            torch.autograd.grad(y, (x, up, down), dy),
            torch.autograd.grad(expected, exact, dy.double()),
            strict=True,
        ):
            assert error(got, want) < 1e-2
        for width in (768, 1280, 320):
            wide = (0.1 * torch.randn(width, d, device="cuda")).bfloat16()
            scale = torch.rand(n, device="cuda")
            product = scaled_product(x.detach(), wide.T, scale)
            assert error(product, scale[:, None] * (x.double() @ wide.double().T)) < 5e-3


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_folded_model_is_the_model_on_the_gpu(compiled: bool) -> None:
    pytest.importorskip("quack", reason="needs the quack-kernels package")
    pytest.importorskip("flash_attn.cute", reason="needs the flash-attn-4 package")
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=512, d_model=384, n_layers=3, n_heads=6, n_kv_heads=2, max_seq_len=256,
        mlp="relu2", norm="folded", norm_eps=1e-2,
    )  # fmt: skip
    with torch.device("cuda"):
        model = Transformer(config)
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    exact = copy.deepcopy(model)
    exact.compute_dtype = torch.float32
    exact.choose_backends(norm="plain", attention="math", matmul="plain", loss="plain")
    x = torch.zeros(1, 256, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert all(block.folds(x) for block in model.blocks)  # type: ignore[operator]
    ids = torch.randint(0, 512, (4, 257), device="cuda")
    expected = exact(ids[:, :-1], ids[:, 1:]).loss
    run = torch.compile(model, dynamic=False) if compiled else model
    loss = run(ids[:, :-1], ids[:, 1:]).loss
    assert abs(float(loss.detach()) - float(expected.detach())) < 2e-3
    got = torch.autograd.grad(loss, list(model.parameters()))
    want = torch.autograd.grad(expected, list(exact.parameters()))
    apart = copy.deepcopy(model)
    apart.choose_backends(norm="fused")
    usual = torch.autograd.grad(apart(ids[:, :-1], ids[:, 1:]).loss, list(apart.parameters()))
    names = [name for name, _ in model.named_parameters()]
    for name, a, b, c in zip(names, got, want, usual, strict=True):
        # bf16 in eleven products: no further from float32 than the norms apart, nearly
        assert error(a, b) < 1.25 * error(c, b) + 2e-3, name
