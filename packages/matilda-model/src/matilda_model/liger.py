"""Liger's fused linear + cross-entropy, made safe: float32 sums, outside the compiled graph.

Inside a compiled graph Liger's kernel is silently wrong as soon as a target is ignored, and its
default bf16 sum of weight gradients plateaus; see docs/LOG.md. It waits for the device once a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matilda_model.loss import LossOutput
from matilda_model.second_derivative import refuse_second_derivative

_IGNORED = -100  # Liger's ignore index


@torch.compiler.disable  # type: ignore[untyped-decorator]
def liger_linear_cross_entropy(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None, z_loss: float
) -> LossOutput:
    """Loss by Liger. Raises ValueError without the `liger` extra or off CUDA.

    RuntimeError for a target outside the vocabulary, which shows when the GPU is next waited for.
    """
    if h_ND.device.type != "cuda":
        raise ValueError(
            "`loss` back end 'liger' runs on CUDA only: use 'plain' or 'auto' on this device"
        )
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction,
        )
    except ImportError as error:
        raise ValueError(
            "`loss` back end 'liger' needs the extra: pip install 'matilda-model[liger]'"
        ) from error
    # Liger's kernel reads and writes wherever a target but its ignore index points
    known_N = (targets_N >= 0) & (targets_N < weight_VD.shape[0]) | (targets_N == _IGNORED)
    torch._assert_async(
        known_N.all(),
        f'a target is outside the vocabulary: "liger" takes ids of 0..{weight_VD.shape[0] - 1}',
    )
    out: tuple[Any, ...] = LigerFusedLinearCrossEntropyFunction.apply(
        h_ND,
        weight_VD.to(h_ND.dtype),
        targets_N,
        None,  # bias
        None,  # class weights
        _IGNORED,
        z_loss,
        0.0,  # label smoothing
        "mean",
        softcap,
        True,  # return z-loss
        torch.float32,  # dtype of the weight gradient's sum
    )
    if out[0].requires_grad:  # its backward pass, too, returns what it saved
        out[0].register_hook(lambda _: refuse_second_derivative())
    loss, zl = out[0].float(), out[1].float().detach()
    return LossOutput(loss, loss.detach() - zl, zl)
