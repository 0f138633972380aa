"""Output head and loss in one call, so that a back end may avoid holding the logits.

Every back end computes the same function: with `z = softcap(h @ weight.T)` in float32 and
`lse = logsumexp(z)`, the mean over tokens of `lse - z[target]` (cross-entropy) plus
`z_loss * lse ** 2`.

Shape suffixes: N tokens (batch times sequence), D model, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from matilda_model.device import has_triton

IGNORE = -1
_CHUNK_TOKENS = 8192


class LossOutput(NamedTuple):
    """Scalars, float32. `loss` carries the gradient and equals `ce + z_loss`."""

    loss: Tensor
    ce: Tensor
    """Mean cross-entropy of the tokens, nats; detached."""
    z_loss: Tensor
    """Mean of `coefficient * logsumexp ** 2`; detached."""


def softcap_logits(logits: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)`; the logits themselves when `cap` is None."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def linear_cross_entropy(
    h_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    backend: str = "auto",
) -> LossOutput:
    """Mean loss of `h_ND` (compute dtype) through the head `weight_VD` (float32 master weight).

    `targets_N` is int64. A target of -1 is ignored by every back end but `"liger"`, whose targets
    must all be real. Back ends:

    - `"plain"`: all logits at once; what inductor or a CPU does best at small sizes.
    - `"chunked"`: rows in chunks, gradients taken while the chunk's logits exist; float32 sums.
    - `"liger"`: Liger's fused kernel, float32 accumulation, outside the compiled graph (it is
      wrong inside one); needs the `liger` extra and CUDA.
    - `"fused"`: as chunked, with soft-cap, loss and gradient in one Triton kernel; CUDA.
    - `"auto"`: plain on a CPU, fused on CUDA (chunked where triton is missing).
    """
    if backend == "auto":
        on_gpu = "fused" if has_triton() else "chunked"
        backend = on_gpu if h_ND.device.type == "cuda" else "plain"
    if backend == "plain":
        return _plain(h_ND, weight_VD, targets_N, softcap, z_loss)
    if backend in ("chunked", "fused"):
        with_grad = torch.is_grad_enabled() and (h_ND.requires_grad or weight_VD.requires_grad)
        function = _ChunkedLoss if backend == "chunked" else _FusedLoss
        loss, ce, zl = function.apply(h_ND, weight_VD, targets_N, softcap, z_loss, with_grad)
        return LossOutput(loss, ce, zl)
    if backend == "liger":
        from matilda_model.liger import liger_linear_cross_entropy

        out: LossOutput = liger_linear_cross_entropy(h_ND, weight_VD, targets_N, softcap, z_loss)
        return out
    raise ValueError(f"`backend` must be auto, fused, plain, chunked or liger, not {backend!r}")


def _plain(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None, z_loss: float
) -> LossOutput:
    logits_NV = softcap_logits(F.linear(h_ND, weight_VD.to(h_ND.dtype)).float(), softcap)
    valid_N = targets_N != IGNORE
    count = valid_N.sum().clamp_min(1)
    if z_loss == 0.0:
        ce = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum") / count
        return LossOutput(ce, ce.detach(), torch.zeros_like(ce))
    lse_N = torch.logsumexp(logits_NV, dim=-1)
    target_N = logits_NV.gather(-1, targets_N.clamp_min(0)[:, None])[:, 0]
    ce = ((lse_N - target_N) * valid_N).sum() / count
    zl = z_loss * (lse_N.square() * valid_N).sum() / count
    return LossOutput(ce + zl, ce.detach(), zl.detach())


class _ChunkedLoss(torch.autograd.Function):
    """Loss and both gradients in one sweep over the rows: no logits outlive their chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        softcap: float | None,
        z_loss: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        w_VD = weight_VD.to(h_ND.dtype)
        valid_N = targets_N != IGNORE
        count = valid_N.sum().clamp_min(1).float()
        ce = torch.zeros((), device=h_ND.device)
        zl = torch.zeros((), device=h_ND.device)
        vocab = torch.arange(w_VD.shape[0], device=h_ND.device)
        dw_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if with_grad else None
        dh_chunks = []
        for h, targets, valid in zip(
            torch.split(h_ND, _CHUNK_TOKENS),
            torch.split(targets_N, _CHUNK_TOKENS),
            torch.split(valid_N, _CHUNK_TOKENS),
            strict=True,
        ):
            z = softcap_logits((h @ w_VD.T).float(), softcap)
            lse = torch.logsumexp(z, dim=-1)
            target = z.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
            ce = ce + ((lse - target) * valid).sum()
            zl = zl + z_loss * (lse.square() * valid).sum()
            if dw_VD is None:
                continue
            dz = torch.exp(z - lse[:, None]) * (1.0 + 2.0 * z_loss * lse)[:, None]
            dz = dz - (vocab == targets[:, None]).float()
            if softcap is not None:
                dz = dz * (1.0 - (z / softcap).square())
            dz = (dz * (valid / count)[:, None]).to(h.dtype)
            dh_chunks.append(dz @ w_VD)
            dw_VD = dw_VD + (dz.T @ h).float()
        if dw_VD is not None:
            ctx.save_for_backward(torch.cat(dh_chunks), dw_VD)
        ce, zl = ce / count, zl / count
        ctx.mark_non_differentiable(ce, zl)
        return ce + zl, ce, zl

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dh_ND, dw_VD = ctx.saved_tensors
        dh = (dh_ND * grad_loss).to(dh_ND.dtype)
        return dh, dw_VD * grad_loss, None, None, None, None


class _FusedLoss(torch.autograd.Function):
    """As `_ChunkedLoss`, through the Triton kernel; one opaque operator to the compiler."""

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        softcap: float | None,
        z_loss: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from matilda_model.triton_loss import linear_cross_entropy_op

        ce, zl, dh_ND, dw_VD = linear_cross_entropy_op(
            h_ND, weight_VD.to(h_ND.dtype), targets_N, softcap, z_loss, with_grad
        )
        if with_grad:
            ctx.save_for_backward(dh_ND, dw_VD)
        ctx.mark_non_differentiable(ce, zl)
        return ce + zl, ce, zl

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dh_ND, dw_VD = ctx.saved_tensors
        dh = (dh_ND * grad_loss).to(dh_ND.dtype)
        return dh, dw_VD * grad_loss, None, None, None, None
