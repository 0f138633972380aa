"""The loss through DDP and FSDP2 equals the bare model's, value and gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from matilda_model import ModelConfig, Transformer, load_pretrained, save_pretrained

CONFIG = ModelConfig(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16,
    mlp="relu2", mlp_ratio=4.0, logit_softcap=30.0, z_loss=1e-4,
)  # fmt: skip


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")  # torch warns of its own interfaces here
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_wrapped_loss_and_gradients_equal_the_bare_model(wrapper: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = Transformer(CONFIG)
    model = copy.deepcopy(bare)
    ids = torch.randint(0, 64, (2, 17))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    bare(inputs, targets).loss.backward()
    wrapped: torch.nn.Module
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
        saved: Any = wrapped
        loaded = load_pretrained(save_pretrained(saved, tmp_path / "model"))
        assert all(map(torch.equal, loaded.parameters(), bare.parameters()))
    else:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"`embed\.weight` is sharded over ranks"):
            save_pretrained(model, tmp_path / "model")
    out = wrapped(inputs, targets)
    out.loss.backward()
    assert not out.ce.requires_grad
    for (name, expected), parameter in zip(
        bare.named_parameters(), model.parameters(), strict=True
    ):
        grad = parameter.grad
        assert grad is not None, name
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        assert expected.grad is not None
        torch.testing.assert_close(
            grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}"
        )
