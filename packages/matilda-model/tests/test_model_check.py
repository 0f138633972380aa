"""The start-up self-check passes what is right, and stops or replaces what is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import matilda_model.check as check_module
from matilda_model import KernelMismatchError, ModelConfig, Transformer, self_check

HERO = ModelConfig(
    vocab_size=128, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32,
    mlp="relu2", mlp_ratio=4.0, logit_softcap=30.0, z_loss=1e-4,
)  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 128, (3, 33))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_of_a_cpu_model_passes(dtype: torch.dtype) -> None:
    model = Transformer(HERO)
    model.compute_dtype = dtype
    rows = self_check(model, *batch())
    assert all(row.ok for row in rows)
    assert {row.kernel for row in rows} == {"norm", "attention", "matmul", "loss"}
    assert any("gradient of the head" in row.quantity for row in rows)


def test_weights_gradients_and_generators_are_left_alone() -> None:
    model = Transformer(HERO)
    inputs, targets = batch()
    before = torch.random.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    self_check(model, inputs, targets)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mask_of_documents_is_part_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(dataclasses.replace(HERO, document_token=0))
    inputs, targets = batch()
    inputs[:, [0, 11]] = 0
    assert all(row.ok for row in self_check(model, inputs, targets))
    right = check_module.causal_attention

    def one_document(*arguments: object) -> Tensor:
        return right(*arguments[:-1])  # type: ignore[arg-type]

    monkeypatch.setattr(check_module, "causal_attention", one_document)
    with pytest.raises(KernelMismatchError, match="`attention` kernel 'auto' is wrong"):
        self_check(model, inputs, targets)


@pytest.mark.parametrize("pattern", ["SLSL", "LSLS"])
def test_full_and_windowed_layers_are_both_checked(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(dataclasses.replace(HERO, n_layers=4, window=8, window_pattern=pattern))
    assert all(row.ok for row in self_check(model, *batch()))
    right = check_module.causal_attention
    for broken in (8, None):

        def wrong(*arguments: Tensor, broken: int | None = broken) -> Tensor:
            y = right(*arguments)  # type: ignore[arg-type]
            return 1.1 * y if arguments[4] == broken else y

        monkeypatch.setattr(check_module, "causal_attention", wrong)
        with pytest.raises(KernelMismatchError, match="`attention` kernel 'auto' is wrong"):
            self_check(model, *batch())


right_attention = check_module.causal_attention


def forgets_the_mask(
    q: Tensor, k: Tensor, v: Tensor, backend: str, window: None, documents: None
) -> Tensor:
    if backend == "math":
        return right_attention(q, k, v, backend, window, documents)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return y.transpose(1, 2)


def always_forgets_the_mask(q: Tensor, k: Tensor, v: Tensor, *rest: None) -> Tensor:
    return forgets_the_mask(q, k, v, "auto", None, None)


def test_a_wrong_attention_kernel_stops_the_run_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "causal_attention", forgets_the_mask)
    with pytest.raises(KernelMismatchError, match="`attention` kernel 'auto' is wrong"):
        self_check(Transformer(HERO), *batch())


def test_a_loss_kernel_with_a_wrong_gradient_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = check_module.linear_cross_entropy

    def wrong(h: Tensor, w: Tensor, t: Tensor, *, backend: str, **options: float) -> object:
        out = right(h, w, t, backend=backend, **options)  # type: ignore[arg-type]
        if backend == "plain":
            return out
        return out._replace(loss=out.loss * 1.0 + 0.1 * h.mean())

    monkeypatch.setattr(check_module, "linear_cross_entropy", wrong)
    with pytest.raises(KernelMismatchError, match="`loss` kernel"):
        self_check(Transformer(HERO), *batch())


def test_a_wrong_kernel_chosen_by_auto_is_replaced_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check_module, "causal_attention", forgets_the_mask)
    model = Transformer(HERO)
    rows = self_check(model, *batch(), fall_back=True)
    assert {row.kernel for row in rows if not row.ok} == {"attention"}
    assert model.config.attention == "math"
    assert model.blocks[1].attn.backend == "math"

    named = Transformer(ModelConfig(**{**HERO.__dict__, "attention": "flash"}))
    with pytest.raises(KernelMismatchError, match="'flash' is wrong"):
        self_check(named, *batch(), fall_back=True)
    monkeypatch.setattr(check_module, "causal_attention", always_forgets_the_mask)
    with pytest.raises(KernelMismatchError, match="'math' is wrong"):  # what replaces it, too
        self_check(Transformer(HERO), *batch(), fall_back=True)


def test_a_kernel_that_cannot_run_is_named_or_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> Tensor:
        if arguments[3] == "math":
            return right_attention(*arguments)  # type: ignore[arg-type]
        raise RuntimeError("no such architecture\nand a long trace")

    monkeypatch.setattr(check_module, "causal_attention", broken)
    with pytest.raises(KernelMismatchError, match=r"RuntimeError: no such architecture\); set"):
        self_check(Transformer(HERO), *batch())
    model = Transformer(HERO)
    rows = self_check(model, *batch(), fall_back=True)
    assert [row.raised for row in rows if not row.ok] == ["RuntimeError: no such architecture"]
    assert model.config.attention == "math"


def test_a_product_that_forgets_the_residual_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(HERO)
    attn = type(model.blocks[0].attn)
    right = attn.output
    monkeypatch.setattr(attn, "output", lambda self, y, residual: right(self, y, None))
    with pytest.raises(KernelMismatchError, match="`matmul` kernel 'auto' is wrong"):
        self_check(model, *batch())


@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_a_model_whose_weights_were_cast_is_checked(mlp: str) -> None:
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(HERO, mlp=mlp)).bfloat16()
    assert all(row.ok for row in self_check(model, *batch()))
