"""Output head and loss in one call, so that a back end may avoid holding the logits.

Every back end computes the same function: with `z = softcap(h @ weight.T)` in float32 and
`lse = logsumexp(z)`, the mean over tokens of `lse - z[target]` (cross-entropy) plus
`z_loss * lse ** 2`.

Shape suffixes: N tokens (batch times sequence), D model, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from matilda_model.device import has_hopper_triton, has_quack, has_triton, interprets_triton
from matilda_model.second_derivative import refuse_second_derivative

_CHUNK_TOKENS = 8192
_CPU_CHUNK_LOGITS = 1 << 22


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

    `targets_N` is int64. A negative target (-1, torch's -100) is ignored by every back end but
    `"liger"`, whose targets must all be real. Raises ValueError unless each row of `h_ND` has one
    target, and for a back end that cannot run here; a target that exceeds the vocabulary is an
    error, on a GPU when it is next waited for. Back ends:

    - `"plain"`: all logits at once, differentiated by autograd: the reference.
    - `"chunked"`: rows in chunks, gradients taken while the chunk's logits exist; float32 sums.
    - `"liger"`: Liger's fused kernel, float32 accumulation, outside the compiled graph (it is
      wrong inside one); needs the `liger` extra and CUDA.
    - `"fused"`: as chunked, with soft-cap, loss and gradient in one Triton kernel; CUDA.
    - `"fused_quack"`: as fused, the logits' product by quack-kernels; Hopper, bf16, `hopper` extra.
    - `"fused_fp8"`: as fused, the head's product and its gradient for `h_ND` in 8 bits: not exact,
      see docs/RESULTS.md for losses beside bf16's; Hopper or later, bf16, sizes divisible by 16.
    - `"auto"`: fused_quack or fused on CUDA, where they run, else chunked.

    `"plain"` alone can be differentiated twice and works under `torch.func`: the others raise
    RuntimeError for `create_graph=True`.
    """
    _check_targets(h_ND, targets_N)
    if backend == "auto":
        backend = "fused" if h_ND.device.type == "cuda" and has_triton() else "chunked"
        if backend == "fused" and h_ND.dtype == torch.bfloat16 and has_quack():
            backend = "fused_quack"
    if backend == "plain":
        return _plain(h_ND, weight_VD, targets_N, softcap, z_loss)
    if backend == "fused_fp8":
        _check_fp8(h_ND, weight_VD)
    if backend in ("fused", "fused_quack"):
        _check_cuda(h_ND, backend)
    if backend in ("chunked", "fused", "fused_quack", "fused_fp8"):
        with_grad = torch.is_grad_enabled() and (h_ND.requires_grad or weight_VD.requires_grad)
        loss, ce, zl = _SweepLoss.apply(
            h_ND, weight_VD, targets_N, softcap, z_loss, with_grad, backend
        )
        return LossOutput(loss, ce, zl)
    if backend == "liger":
        from matilda_model.liger import liger_linear_cross_entropy

        out: LossOutput = liger_linear_cross_entropy(h_ND, weight_VD, targets_N, softcap, z_loss)
        return out
    raise ValueError(
        "`backend` must be auto, fused, fused_quack, fused_fp8, plain, chunked or liger, not "
        f"{backend!r}"
    )


@torch.no_grad()
def token_cross_entropy(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, softcap: float | None = None
) -> Tensor:
    """Each token's cross-entropy in nats, float32 [N], without gradient; 0 where ignored.

    The arguments are those of `linear_cross_entropy`; logits exist for a chunk of rows at a time.
    """
    _check_targets(h_ND, targets_N)
    w_VD = weight_VD.to(h_ND.dtype)
    rows = _chunk_tokens(h_ND.device.type, w_VD.shape[0])
    losses = []
    for h, targets in zip(torch.split(h_ND, rows), torch.split(targets_N, rows), strict=True):
        z = (h @ w_VD.T).float()
        if softcap is not None:
            z.div_(softcap).tanh_().mul_(softcap)
        picked = z.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
        losses.append((torch.logsumexp(z, dim=-1) - picked) * (targets >= 0))
    return torch.cat(losses)


def _plain(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None, z_loss: float
) -> LossOutput:
    logits_NV = softcap_logits(F.linear(h_ND, weight_VD.to(h_ND.dtype)).float(), softcap)
    valid_N = targets_N >= 0
    count = valid_N.sum().clamp_min(1)
    if z_loss == 0.0:
        known_N = targets_N.clamp_min(-1)
        ce = F.cross_entropy(logits_NV, known_N, ignore_index=-1, reduction="sum") / count
        return LossOutput(ce, ce.detach(), torch.zeros_like(ce))
    lse_N = torch.logsumexp(logits_NV, dim=-1)
    target_N = logits_NV.gather(-1, targets_N.clamp_min(0)[:, None])[:, 0]
    ce = ((lse_N - target_N) * valid_N).sum() / count
    zl = z_loss * (lse_N.square() * valid_N).sum() / count
    return LossOutput(ce + zl, ce.detach(), zl.detach())


def _check_targets(h_ND: Tensor, targets_N: Tensor) -> None:
    if len(h_ND.shape) != 2:
        raise ValueError(
            f"hidden states of shape {tuple(h_ND.shape)!r} are no rows: flatten them to [N, D]"
        )
    if targets_N.shape != h_ND.shape[:1]:
        raise ValueError(
            f"targets of shape {tuple(targets_N.shape)!r} do not fit {h_ND.shape[0]!r} tokens: "
            "give one target for each"
        )


def _check_cuda(h_ND: Tensor, backend: str) -> None:
    if h_ND.device.type == "cpu" and not interprets_triton():
        raise ValueError(
            f"`loss` back end {backend!r} runs on CUDA only: use 'plain' or 'auto' on this device"
        )


def _check_fp8(h_ND: Tensor, weight_VD: Tensor) -> None:
    if h_ND.device.type != "cuda" or h_ND.dtype != torch.bfloat16 or not has_hopper_triton():
        raise ValueError(
            '`loss` "fused_fp8" needs a Hopper or later GPU, triton and bf16, not '
            f'{h_ND.dtype} on {h_ND.device.type}; set it to "auto"'
        )
    if weight_VD.shape[0] % 16 or weight_VD.shape[1] % 16:
        raise ValueError(
            '`loss` "fused_fp8" needs `vocab_size` and `d_model` divisible by 16, not '
            f'{weight_VD.shape[0]} and {weight_VD.shape[1]}; set it to "auto"'
        )


class _SweepLoss(torch.autograd.Function):
    """Loss and both gradients in one sweep over the rows: no logits outlive their chunk.

    The sweep gives sums and the gradients of sums; the mean's `1 / count` multiplies at the end,
    so that it is not rounded to bf16 in every row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        softcap: float | None,
        z_loss: float,
        with_grad: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sweep: Any = _chunked_sweep
        if backend != "chunked":
            from matilda_model.triton_loss import linear_cross_entropy_op

            head = {"fused": "cublas", "fused_quack": "quack", "fused_fp8": "fp8"}[backend]
            sweep = partial(linear_cross_entropy_op, head=head)
        w_VD = weight_VD.to(h_ND.dtype)
        ce, zl, dh_ND, dw_VD = sweep(h_ND, w_VD, targets_N, softcap, z_loss, with_grad)
        count = (targets_N >= 0).sum().clamp_min(1).float()
        if with_grad:
            ctx.save_for_backward(dh_ND, dw_VD, count)
        ce, zl = ce / count, zl / count
        ctx.mark_non_differentiable(ce, zl)
        return ce + zl, ce, zl

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        dh_ND, dw_VD, count = ctx.saved_tensors
        scale = grad_loss / count
        return (dh_ND * scale).to(dh_ND.dtype), dw_VD * scale, None, None, None, None, None


def _chunked_sweep(
    h_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    softcap: float | None,
    z_loss: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed cross-entropy and z-loss, their gradients for `h` (its dtype) and `w` (float32)."""
    ce = torch.zeros((), device=h_ND.device)
    zl = torch.zeros((), device=h_ND.device)
    dw_VD = torch.zeros_like(w_VD, dtype=torch.float32)
    dh_chunks = []
    rows = _chunk_tokens(h_ND.device.type, w_VD.shape[0])
    for h, targets in zip(torch.split(h_ND, rows), torch.split(targets_N, rows), strict=True):
        valid = (targets >= 0).float()
        index = targets.clamp_min(0)[:, None]
        z = (h @ w_VD.T).float()
        if softcap is not None:
            z.div_(softcap).tanh_().mul_(softcap)
        lse = torch.logsumexp(z, dim=-1)
        ce = ce + ((lse - z.gather(-1, index)[:, 0]) * valid).sum()
        zl = zl + z_loss * (lse.square() * valid).sum()
        if not with_grad:
            continue
        slope = None if softcap is None else z.square().mul_(-1.0 / softcap**2).add_(1.0)
        dz = z.sub_(lse[:, None]).exp_().mul_(((1.0 + 2.0 * z_loss * lse) * valid)[:, None])
        dz.scatter_add_(-1, index, -valid[:, None])
        if slope is not None:
            dz.mul_(slope)
        dz = dz.to(h.dtype)
        dh_chunks.append(dz @ w_VD)
        dw_VD.add_(dz.T @ h)
    return ce, zl, torch.cat(dh_chunks) if with_grad else h_ND.new_empty(0), dw_VD


def _chunk_tokens(device_type: str, vocab_size: int) -> int:
    """Rows whose logits exist at once: matmul-sized on a GPU, within the caches' reach on a CPU."""
    return _CHUNK_TOKENS if device_type != "cpu" else max(1, _CPU_CHUNK_LOGITS // vocab_size)
