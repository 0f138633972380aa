"""What stands between a bad batch and the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["clip_gradients"]


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their global L2 norm is at most `max_norm`; 0 leaves them alone.

    Returns the norm before clipping, a scalar on the device. A non-finite norm leaves non-finite
    gradients behind: the caller must not step on them. Sharded gradients count whole.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm
