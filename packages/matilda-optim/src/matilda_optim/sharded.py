"""FSDP2 and other DTensor layouts: whole matrices are put together, orthogonalised and sent back.

Parameters sharded over one mesh dimension take two packed exchanges per shape class: each rank
sends its rows (or columns) of every matrix to that matrix's owner, the owners work on whole
matrices, and the pieces return. Shards may be uneven or empty. Replicated mesh dimensions (HSDP)
repeat the work. Any other layout is gathered in full and cut again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
    from matilda_optim.triton_shards import WholeMatrices

Members = Sequence[tuple[dict[str, Any], Tensor]]
"""Whole matrices and their groups."""


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


def gather_and_cut(
    group: dict[str, Any],
    param: DTensor,
    direction: Tensor,
    orthogonalize: Callable[[Members], None],
) -> None:
    """The general way, for one parameter: every rank works on the whole matrix."""
    mesh, placements = param.device_mesh, param.placements
    sharded = DTensor.from_local(
        direction, mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    whole = sharded.full_tensor().contiguous()
    orthogonalize([(group, whole)])
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    direction.copy_(replicated.redistribute(placements=placements).to_local())


def sharded_step(
    work: Work, states: dict[Tensor, dict[str, Any]], kernels: WholeMatrices | None
) -> None:
    """One Muon step of DTensor parameters, by the Triton kernels or in pure torch."""
    jobs: dict[Any, list[tuple[dict[str, Any], DTensor, Tensor]]] = {}
    general: list[tuple[dict[str, Any], DTensor, Tensor]] = []
    updates = []
    for group, params in work:
        tensors: list[DTensor] = [p for p in params if isinstance(p, DTensor)]
        locals_ = [p.to_local() for p in tensors]
        grads = [_local_grad(p) for p in tensors]
        buffers = [states[p]["momentum_buffer"].to_local() for p in tensors]
        masks = _finite(tensors, grads) if group["nonfinite"] == "skip" else None
        directions = _directions(group, locals_, grads, buffers, masks, kernels is not None)
        updates.append((group, tensors, locals_, directions, masks))
        for p, direction in zip(tensors, directions, strict=True):
            layout = layout_of(p)
            if layout is None:
                general.append((group, p, direction))
            else:
                shape_class = tuple(sorted(p.shape))
                jobs.setdefault((layout, shape_class), []).append((group, p, direction))
    orthogonalize = kernels or _reference
    for (layout, _), members in jobs.items():
        groups = [group for group, _, _ in members]

        def whole_matrices(
            indices: list[int], wholes: list[Tensor], groups: list[dict[str, Any]] = groups
        ) -> None:
            orthogonalize([(groups[i], w) for i, w in zip(indices, wholes, strict=True)])

        exchange([p for _, p, _ in members], [d for _, _, d in members], layout, whole_matrices)
    for group, p, direction in general:
        gather_and_cut(group, p, direction, orthogonalize)
    for group, tensors, locals_, directions, masks in updates:
        if kernels is None:
            apply_update(group, locals_, directions, masks)
        else:
            _apply_by_kernels(group, tensors, locals_, directions, masks)


def _directions(
    group: dict[str, Any],
    locals_: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    masks: list[Tensor] | None,
    kernels: bool,
) -> list[Tensor]:
    """Advances the momenta; a matrix that is skipped keeps its own and gets a zero direction."""
    if masks is not None:
        sign = -1.0 if group["maximize"] else 1.0
        grads = [
            torch.where(m > 0, g, (sign * b).to(g.dtype))
            for g, b, m in zip(grads, buffers, masks, strict=True)
        ]
        before = [b.clone() for b in buffers]
    if kernels:
        from matilda_optim.triton_shards import shard_directions

        directions = shard_directions(group, [g.contiguous() for g in grads], buffers)
    else:
        plain = {**group, "nonfinite": "propagate"}
        directions, _ = momentum_step(plain, locals_, grads, buffers)
    if masks is not None:
        for direction, buffer, old, mask in zip(directions, buffers, before, masks, strict=True):
            direction.mul_(mask)
            buffer.copy_(torch.where(mask > 0, buffer, old))
    return directions


def _finite(params: list[DTensor], grads: list[Tensor]) -> list[Tensor]:
    """Of each shard's shape: 1 if the whole gradient is finite on all ranks, 0 if not."""
    flags = [torch.isfinite(g).all().float() for g in grads]
    for mesh in dict.fromkeys(p.device_mesh for p in params):  # the same order on every rank
        here = [i for i, p in enumerate(params) if p.device_mesh == mesh]
        together = torch.stack([flags[i] for i in here])
        for dim in range(mesh.ndim):
            dist.all_reduce(together, dist.ReduceOp.MIN, group=mesh.get_group(dim))
        for i, flag in zip(here, together.unbind(), strict=True):
            flags[i] = flag
    return [flag.expand(g.shape) for flag, g in zip(flags, grads, strict=True)]


def _apply_by_kernels(
    group: dict[str, Any],
    params: list[DTensor],
    locals_: list[Tensor],
    updates: list[Tensor],
    masks: list[Tensor] | None,
) -> None:
    from matilda_optim.triton_shards import one_ratio, update_shard

    for i, (p, local, update) in enumerate(zip(params, locals_, updates, strict=True)):
        ratio = one_ratio(group, p)
        assert ratio is not None  # the caller sends other parameters the pure-torch way
        before = None if masks is None else local.clone()
        update_shard(group, ratio, local, update)
        if before is not None and masks is not None:
            local.copy_(torch.where(masks[i] > 0, local, before))


def _reference(members: Members) -> None:
    orthogonalize_blocks(members, _alone)


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
