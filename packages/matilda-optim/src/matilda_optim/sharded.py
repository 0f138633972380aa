"""FSDP2 and other DTensor layouts: whole matrices are put together, orthogonalised and sent back.

Parameters sharded over one mesh dimension take two packed exchanges per shape class: each rank
sends its rows (or columns) of every matrix to that matrix's owner, the owners work on whole
matrices, and the pieces return. Shards may be uneven or empty. Replicated mesh dimensions (HSDP)
repeat the work. Any other layout is gathered in full and cut again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from matilda_optim.reference import (
    Work,
    apply_update,
    momentum_step,
    orthogonalize_blocks,
)


class Layout(NamedTuple):
    """How a class of parameters lies on its mesh: what one exchange can carry."""

    mesh: Any
    mesh_dim: int
    tensor_dim: int


def layout_of(param: DTensor) -> Layout | None:
    """The one sharded mesh dimension of `param`; None where the layout needs the general way."""
    shards = [(i, p) for i, p in enumerate(param.placements) if not isinstance(p, Replicate)]
    if len(shards) != 1:
        return None
    index, placement = shards[0]
    if type(placement) is not Shard:
        return None
    return Layout(param.device_mesh, index, placement.dim)


def chunk_bounds(size: int, world: int, rank: int) -> tuple[int, int]:
    """Where DTensor puts rank `rank`'s part of a dimension: `torch.chunk`'s rule, maybe empty."""
    per_rank = -(-size // world)
    return min(rank * per_rank, size), min((rank + 1) * per_rank, size)


def exchange(
    params: Sequence[DTensor],
    directions: Sequence[Tensor],
    layout: Layout,
    orthogonalize: Callable[[list[int], list[Tensor]], None],
) -> None:
    """Replaces each local direction by its part of the whole update, with two all-to-alls.

    `orthogonalize(indices, wholes)` gets this rank's whole matrices and their positions in
    `params`. Matrix i belongs to rank i // ceil(count / ranks).
    """
    group = layout.mesh.get_group(layout.mesh_dim)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    dim = layout.tensor_dim
    count = len(params)
    per_rank = -(-count // world)
    owned = [range(min(r * per_rank, count), min((r + 1) * per_rank, count)) for r in range(world)]

    def piece_shape(i: int, source: int) -> list[int]:
        shape = list(params[i].shape)
        low, high = chunk_bounds(shape[dim], world, source)
        shape[dim] = high - low
        return shape

    def numel(i: int, source: int) -> int:
        total = 1
        for size in piece_shape(i, source):
            total *= size
        return total

    to_owner = [sum(numel(i, rank) for i in owned[r]) for r in range(world)]
    from_source = [sum(numel(i, r) for i in owned[rank]) for r in range(world)]
    packed = torch.cat([d.reshape(-1) for d in directions])
    received = packed.new_empty(sum(from_source))
    dist.all_to_all_single(received, packed, from_source, to_owner, group=group)
    pieces: dict[int, list[Tensor]] = {i: [] for i in owned[rank]}
    offset = 0
    for source in range(world):
        for i in owned[rank]:
            size = numel(i, source)
            pieces[i].append(received[offset : offset + size].view(piece_shape(i, source)))
            offset += size
    wholes = [torch.cat(pieces[i], dim=dim) for i in owned[rank]]
    orthogonalize(list(owned[rank]), wholes)
    back = [
        whole.narrow(dim, low, high - low).reshape(-1)
        for source in range(world)
        for whole in wholes
        for low, high in [chunk_bounds(whole.shape[dim], world, source)]
    ]
    returning = torch.cat(back) if back else packed.new_empty(0)
    dist.all_to_all_single(packed, returning, to_owner, from_source, group=group)
    offset = 0
    for direction in directions:
        size = direction.numel()
        direction.copy_(packed[offset : offset + size].view(direction.shape))
        offset += size


def gather_and_cut(group: dict[str, Any], param: DTensor, direction: Tensor) -> None:
    """The general way, for one parameter: every rank works on the whole matrix."""
    mesh, placements = param.device_mesh, param.placements
    sharded = DTensor.from_local(
        direction, mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    whole = sharded.full_tensor().contiguous()
    orthogonalize_blocks([(group, whole)], _alone)
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    direction.copy_(replicated.redistribute(placements=placements).to_local())


def sharded_step(work: Work, states: dict[Tensor, dict[str, Any]]) -> None:
    """One Muon step of DTensor parameters."""
    jobs: dict[Any, list[tuple[dict[str, Any], DTensor, Tensor]]] = {}
    general: list[tuple[dict[str, Any], DTensor, Tensor]] = []
    updates = []
    for group, params in work:
        tensors: list[DTensor] = [p for p in params if isinstance(p, DTensor)]
        locals_ = [p.to_local() for p in tensors]
        grads = [_local_grad(p) for p in tensors]
        buffers = [states[p]["momentum_buffer"].to_local() for p in tensors]
        directions, masks = momentum_step(group, locals_, grads, buffers)
        updates.append((group, locals_, directions, masks))
        for p, direction in zip(tensors, directions, strict=True):
            layout = layout_of(p)
            if layout is None:
                general.append((group, p, direction))
            else:
                shape_class = tuple(sorted(p.shape))
                jobs.setdefault((layout, shape_class), []).append((group, p, direction))
    for (layout, _), members in jobs.items():
        groups = [group for group, _, _ in members]

        def whole_matrices(
            indices: list[int], wholes: list[Tensor], groups: list[dict[str, Any]] = groups
        ) -> None:
            orthogonalize_blocks(
                [(groups[i], whole) for i, whole in zip(indices, wholes, strict=True)], _alone
            )

        exchange([p for _, p, _ in members], [d for _, _, d in members], layout, whole_matrices)
    for group, p, direction in general:
        gather_and_cut(group, p, direction)
    for group, locals_, directions, masks in updates:
        apply_update(group, locals_, directions, masks)


def _alone(newton_schulz: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    return newton_schulz(*batches)


def _local_grad(param: DTensor) -> Tensor:
    grad = param.grad
    assert grad is not None
    if not isinstance(grad, DTensor):
        return grad
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return grad.to_local()
