"""A layer that was replaced or is watched is called, whatever joins its product with others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from matilda_model import ModelConfig, Transformer
from matilda_model.model import Block

IDS_BT = torch.arange(24).view(2, 12)


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, in the form that peft gives it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out + x @ self.a.to(x.dtype).T @ self.b.to(x.dtype).T


def make(mlp: str, dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16,
        mlp=mlp, value_embeddings=True,
    )  # fmt: skip
    model = Transformer(config)
    model.compute_dtype = dtype
    return model


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_an_adapter_on_any_layer_acts_and_learns(mlp: str, dtype: torch.dtype) -> None:
    names = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"]
    for name in names:
        model = make(mlp, dtype)
        expected = model(IDS_BT)
        block = model.blocks[0]
        assert isinstance(block, Block)
        base = block.get_submodule(name)
        assert isinstance(base, nn.Linear)
        adapter = Adapted(base)
        block.set_submodule(name, adapter)
        assert not torch.allclose(model(IDS_BT), expected), name
        model(IDS_BT, IDS_BT).loss.backward()
        for parameter in (adapter.a, adapter.b):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@DTYPES
@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_hooks_see_every_layer_and_change_no_value(mlp: str, dtype: torch.dtype) -> None:
    model = make(mlp, dtype)
    expected = model(IDS_BT, IDS_BT).loss
    seen: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    with model.norms_apart():
        watched = model(IDS_BT, IDS_BT).loss
    assert {name for name, _ in model.named_modules()} - seen == {"blocks"}
    assert torch.equal(watched, expected) or dtype == torch.bfloat16
    torch.testing.assert_close(watched, expected, rtol=1e-3, atol=0)


def test_a_hook_may_change_the_embedding() -> None:
    model = make("swiglu", torch.float32)
    expected = model(IDS_BT)
    model.embed.register_forward_hook(lambda _, __, out: out + 1)
    assert not torch.allclose(model(IDS_BT), expected)


@pytest.mark.parametrize("targets", [None, IDS_BT], ids=["logits", "loss"])
def test_a_head_of_which_the_weight_alone_would_count_is_refused(targets: Tensor | None) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=64,
        d_model=32,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        max_seq_len=16,
        tie_embeddings=False,
    )
    model = Transformer(config)
    assert isinstance(model.head, nn.Linear)
    model(IDS_BT, targets)  # type: ignore[call-overload]
    for head in (Adapted(model.head), nn.Linear(32, 64)):
        model.head = head
        with pytest.raises(ValueError, match=f"`head` is a {type(head).__name__} now"):
            model(IDS_BT, targets)  # type: ignore[call-overload]
    model.head = nn.Linear(32, 64, bias=False)
    model(IDS_BT, targets)  # type: ignore[call-overload]
