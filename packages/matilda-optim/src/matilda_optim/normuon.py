"""NorMuon (arXiv 2510.05491): each neuron's update is divided by its running RMS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from matilda_optim.blocks import BlockSpec, blocks_of

_EPS = 1e-10


def init_normuon_state(state: dict[str, Any], param: Tensor, spec: BlockSpec) -> None:
    """Fills `second_momentum`: one fp32 value for each row of each matrix, shape (rows, 1)."""
    rows = param.shape[0] * (param.shape[1] if spec.stacked else 1)
    state["second_momentum"] = torch.zeros(rows, 1, dtype=torch.float32, device=param.device)


def normalize_neurons(
    group: dict[str, Any],
    directions: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    spec: BlockSpec,
) -> None:
    """Divides each row by its running RMS in place, keeping each matrix's Frobenius norm.

    `directions` are orthogonalised updates already scaled by their learning-rate ratio. A zero
    update stays zero and leaves its row's average as it was.
    """
    beta2 = group["normuon_beta2"]
    for direction, state in zip(directions, states, strict=True):
        start = 0
        for block in blocks_of(direction, spec):
            rows = block.shape[0]
            second = state["second_momentum"][start : start + rows]
            start += rows
            mean_square = block.square().mean(dim=1, keepdim=True).to(second.dtype)
            new = torch.lerp(second, mean_square, 1 - beta2)
            second.copy_(torch.where(mean_square > 0, new, second))
            norm = torch.linalg.vector_norm(block)
            block.mul_(second.clamp_min(_EPS).rsqrt())
            scaled = torch.linalg.vector_norm(block)
            block.mul_(torch.where(scaled > 0, norm / scaled, scaled))
