"""Which matrices a Muon parameter holds, and which matrices share a batch.

A parameter of any rank becomes a stack of 2-D blocks: a Linear weight is one, a convolution is one
after flattening to (out, in·kernel), a fused QKV weight is one per `split` or `heads` block, and a
stack of expert weights is one per leading index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BlockSpec(NamedTuple):
    """How a parameter of one group is cut into matrices."""

    split: tuple[int, ...] | None
    heads: int | None
    stacked: bool


def block_spec(group: dict[str, Any]) -> BlockSpec:
    """Reads `split`, `heads` and `stacked` of a parameter group."""
    split = group.get("split")
    return BlockSpec(
        tuple(int(rows) for rows in split) if split else None,
        group.get("heads"),
        bool(group.get("stacked", False)),
    )


def check_blocks(shape: Sequence[int], spec: BlockSpec, name: str) -> None:
    """Raises ValueError when a parameter of `shape` cannot be cut as `spec` says."""
    if spec.split is not None and spec.heads is not None:
        raise ValueError(f"the group of `{name}` sets both `split` and `heads`; keep one")
    need = 3 if spec.stacked else 2
    if len(shape) < need:
        raise ValueError(
            f"Muon needs at least {need} dimensions, but `{name}` has shape {tuple(shape)!r}; "
            'put it in a group with `algorithm="adamw"`'
        )
    rows = shape[1] if spec.stacked else shape[0]
    if spec.split is not None and sum(spec.split) != rows:
        raise ValueError(
            f"`split` {spec.split!r} adds up to {sum(spec.split)}, "
            f"but `{name}` has {rows} rows (shape {tuple(shape)!r})"
        )
    if spec.heads is not None and (spec.heads < 1 or rows % spec.heads):
        raise ValueError(f"`heads` {spec.heads!r} does not divide the {rows} rows of `{name}`")


def blocks_of(tensor: Tensor, spec: BlockSpec) -> list[Tensor]:
    """The 2-D blocks of a contiguous tensor, as views."""
    stacks = list(tensor.flatten(2).unbind(0)) if spec.stacked else [tensor.flatten(1)]
    if spec.split is not None:
        return [block for stack in stacks for block in torch.split(stack, list(spec.split))]
    if spec.heads is not None and spec.heads > 1:
        return [block for stack in stacks for block in stack.chunk(spec.heads)]
    return stacks


def block_regions(shape: Sequence[int], spec: BlockSpec) -> list[tuple[int, int, int]]:
    """The same blocks of a contiguous tensor as (offset in elements, rows, columns)."""
    stacks = shape[0] if spec.stacked else 1
    rows = shape[1] if spec.stacked else shape[0]
    cols = math.prod(shape[2:] if spec.stacked else shape[1:])
    heights = list(spec.split) if spec.split else [rows // (spec.heads or 1)] * (spec.heads or 1)
    regions = []
    offset = 0
    for _ in range(stacks):
        for height in heights:
            regions.append((offset, height, cols))
            offset += height * cols
    return regions


class ClassKey(NamedTuple):
    """What matrices of one batch have in common; tall ones take part transposed."""

    rows: int
    cols: int
    device: torch.device
    ns_dtype: torch.dtype
    quintics: tuple[tuple[float, float, float], ...]


def class_key(
    block: Tensor, ns_dtype: torch.dtype, quintics: tuple[tuple[float, float, float], ...]
) -> ClassKey:
    """The class of a block."""
    rows, cols = block.shape
    return ClassKey(min(rows, cols), max(rows, cols), block.device, ns_dtype, quintics)
