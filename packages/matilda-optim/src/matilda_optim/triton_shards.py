"""The Triton back end on shards: the bits of the whole matrix, wherever its parts lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from matilda_optim import triton_kernels as kernels
from matilda_optim.blocks import block_regions, block_spec
from matilda_optim.coefficients import resolve_coefficients
from matilda_optim.learning_rate import lr_ratio
from matilda_optim.newton_schulz import NS_DTYPES
from matilda_optim.triton_backend import KernelClass, KernelKey, Matrix, on_device

_BLOCK = 4096

# With these the kernels of `KernelClass` leave a matrix's direction as it is and then replace it by
# its orthogonalisation: blend 0, keep 0, step -1.
_IN_PLACE = {"momentum": 1.0, "maximize": False, "lr": -1.0, "weight_decay": -1.0}


def one_ratio(group: dict[str, Any], param: Tensor) -> float | None:
    """The learning-rate ratio of all blocks of `param`; None if they differ."""
    shapes = {region[1:] for region in block_regions(param.shape, block_spec(group))}
    ratios = {lr_ratio(group["adjust_lr_fn"], *shape) for shape in shapes}
    return ratios.pop() if len(ratios) == 1 else None


def shard_directions(
    group: dict[str, Any], grads: Sequence[Tensor], buffers: Sequence[Tensor]
) -> list[Tensor]:
    """Advances the momenta of shards; returns the fp32 directions."""
    directions = []
    for grad, buffer in zip(grads, buffers, strict=True):
        direction = torch.empty_like(buffer)
        directions.append(direction)
        if buffer.numel():
            with on_device(buffer.device):
                kernels.shard_direction_kernel[(triton.cdiv(buffer.numel(), _BLOCK),)](
                    grad,
                    buffer,
                    direction,
                    1.0 - group["momentum"],
                    -1.0 if group["maximize"] else 1.0,
                    buffer.numel(),
                    BLOCK=_BLOCK,
                    NESTEROV=group["nesterov"],
                    enable_fp_fusion=True,
                )
    return directions


def update_shard(group: dict[str, Any], ratio: float, shard: Tensor, update: Tensor) -> None:
    """Decay and update of one contiguous shard."""
    if not shard.numel():
        return
    lr = float(group["lr"])
    with on_device(shard.device):
        kernels.shard_update_kernel[(triton.cdiv(shard.numel(), _BLOCK),)](
            shard,
            update,
            1.0 - lr * group["weight_decay"],
            lr * ratio,
            shard.numel(),
            BLOCK=_BLOCK,
            CAUTIOUS=group["cautious"],
            enable_fp_fusion=True,
        )


class WholeMatrices:
    """Orthogonalises whole fp32 matrices in place, batched by shape.

    The device tables of a batch are kept for the next step; they hold no state.
    """

    def __init__(self) -> None:
        self._classes: dict[tuple[KernelKey, int], KernelClass] = {}

    def __call__(self, members: Sequence[tuple[dict[str, Any], Tensor]]) -> None:
        batches: dict[KernelKey, list[Matrix]] = {}
        for group, matrix in members:
            # its own gradient and momentum: see _IN_PLACE
            matrix.grad = matrix.view_as(matrix)
            quintics = resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
            dtype = NS_DTYPES[group["ns_dtype"] or "float16"]
            for offset, rows, cols in block_regions(matrix.shape, block_spec(group)):
                key = KernelKey(
                    min(rows, cols),
                    max(rows, cols),
                    matrix.device,
                    torch.float32,
                    torch.float32,
                    dtype,
                    quintics,
                    nesterov=False,
                    cautious=False,
                    skip=False,
                )
                state = {"momentum_buffer": matrix}
                block = Matrix(matrix, state, offset, rows, cols, 1.0, _IN_PLACE)
                batches.setdefault(key, []).append(block)
        for key, blocks in batches.items():
            shapes = [(block.rows, block.cols) for block in blocks]
            place = (key, hash(tuple(shapes)))
            if place not in self._classes:
                self._classes[place] = KernelClass(key, blocks)
            kernel_class = self._classes[place]
            kernel_class.bind(blocks)
            with on_device(key.device):
                kernel_class.launch(kernel_class.prepare(), _alone)
            kernel_class.bind([])
        for _, matrix in members:
            matrix.grad = None


def _alone(newton_schulz: Any, *batches: Tensor) -> Tensor:
    out: Tensor = newton_schulz(*batches)
    return out
