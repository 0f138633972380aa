"""FSDP2 for a run: parameters, gradients and optimizer state divided over the ranks.

Weights stay float32 and are gathered whole for a block's forward and backward (ZeRO-2: gathered
once a step), so the arithmetic is that of one device. Checkpoints hold the whole state
(`gather_state`), the same bytes whatever divided it: a run may change its ranks, or between DDP
and FSDP2, at any resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from matilda_model import Transformer

__all__ = ["WholeState", "gather_state", "shard_model", "whole_model"]


class Stateful(Protocol):
    """What a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any) -> Any: ...


def shard_model(model: Transformer, device: torch.device, world_size: int) -> None:
    """Divide the parameters of `model` over all ranks, in place; a unit of exchange is a block.

    Every rank must hold the same values. Build the optimizer afterwards.
    """
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


class WholeState:
    """A sharded object's state as if one process held it all.

    `state_dict` exchanges tensors: every rank must call it. `load_state_dict` takes the whole
    state and keeps this rank's part, without a word to the others.
    """

    def __init__(self, owner: Stateful) -> None:
        self._owner = owner

    def state_dict(self) -> dict[str, Any]:
        whole: dict[str, Any] = gather_state(self._owner.state_dict())
        return whole

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises what the owner raises when the names or shapes are not its own."""
        self._owner.load_state_dict(_divide_like(self._owner.state_dict(), state))


def gather_state(state: Any) -> Any:
    """Nested `state` with every DTensor and `WholeState` made whole; every rank must call it."""
    if isinstance(state, WholeState):
        return state.state_dict()
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {key: gather_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gather_state(value) for value in state)
    return state


def _divide_like(example: Any, state: Any) -> Any:
    """`state` with every tensor laid out as the tensor in its place in `example`."""
    if isinstance(example, DTensor) and isinstance(state, Tensor):
        whole = state.to(example.device)
        # src_data_rank=None: every rank cuts its part from its own copy
        return distribute_tensor(whole, example.device_mesh, example.placements, src_data_rank=None)
    if isinstance(example, Mapping) and isinstance(state, Mapping):
        return {key: _divide_like(example.get(key), value) for key, value in state.items()}
    if isinstance(example, list) and isinstance(state, list) and len(example) == len(state):
        return [_divide_like(e, s) for e, s in zip(example, state, strict=True)]
    return state


def whole_model(model: Transformer) -> Transformer:
    """A copy of a sharded model that one process can use alone; every rank must call it.

    A model that is not sharded is whole already, and no copy.
    """
    if not isinstance(model, FSDPModule):
        return model
    state = gather_state(nn.Module.state_dict(model))
    with torch.device("meta"):
        whole = Transformer(model.config)
    whole.load_state_dict(state, assign=True)
    whole.cos, whole.sin = model.cos, model.sin
    whole.compute_dtype = model.compute_dtype
    return whole
