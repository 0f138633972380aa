"""What stands around Liger's kernel, with the kernel left out: it needs a GPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from matilda_model import linear_cross_entropy


class Kernel(torch.autograd.Function):
    """Liger's manner alone: the gradient is a constant to torch."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.sum(), torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return slopes[0].detach().expand(4, 2)


@pytest.fixture
def hidden_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three hidden states that say they are on a GPU, and a package that looks like Liger's."""
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module: Any = ModuleType("fused_linear_cross_entropy")
    module.LigerFusedLinearCrossEntropyFunction = SimpleNamespace(
        apply=lambda h, weight, *_: Kernel.apply(weight)
    )
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", module)
    return SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(3, 2))


def test_ligers_loss_refuses_a_second_derivative(hidden_on_a_gpu: Any) -> None:
    weight = torch.ones(4, 2, requires_grad=True)
    targets = torch.tensor([0, 3, 1])
    loss = linear_cross_entropy(hidden_on_a_gpu, weight, targets, backend="liger").loss
    with pytest.raises(RuntimeError, match='choose `loss` "plain"'):
        torch.autograd.grad(loss, weight, create_graph=True)
    assert torch.equal(torch.autograd.grad(loss, weight)[0], torch.ones(4, 2))
    with torch.no_grad():
        linear_cross_entropy(hidden_on_a_gpu, weight, targets, backend="liger")


@pytest.mark.parametrize("wrong", [4, 2**40, -1, -101])
def test_targets_that_ligers_kernel_would_follow_out_of_its_memory_are_refused(
    hidden_on_a_gpu: Any, wrong: int
) -> None:
    weight, targets = torch.ones(4, 2), torch.tensor([0, wrong, 3])
    with pytest.raises(RuntimeError, match=r'"liger" takes ids of 0\.\.3'):
        linear_cross_entropy(hidden_on_a_gpu, weight, targets, backend="liger")
