"""QK-Clip (Kimi K2, arXiv 2507.20534): bounds attention logits by shrinking projections."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def qk_clip_(
    q_weight: Tensor, k_weight: Tensor, max_logits_H: Tensor, *, tau: float = 100.0
) -> Tensor:
    """Shrinks, in place, the heads whose largest attention logit exceeded `tau`.

    A head's factor is γ = min(1, tau / max logit). Its key projection is scaled by √γ, shared by
    the query heads of a group by their smallest γ, and its query projection by what is left, so
    that every head's logits shrink by exactly γ. A head whose largest logit is not finite stays as
    it is: one bad batch would end its weights. Nothing waits for the device. Without effect where
    queries and keys are normed afterwards (QK-norm).

    Args:
        q_weight: (H·E, D). k_weight: (K·E, D), K dividing H.
        max_logits_H: (H,), largest logit (after scaling) of each query head since the last call.
        tau: bound on the logits.

    Returns:
        γ per query head, (H,).

    Raises:
        ValueError: shapes that do not fit, or a `tau` that is not above 0.
    """
    if not tau > 0.0:
        raise ValueError(f"`tau` must be above 0, got {tau!r}")
    heads = max_logits_H.numel()
    if q_weight.shape[0] % heads:
        raise ValueError(f"{q_weight.shape[0]} query rows do not divide into {heads} heads")
    size = q_weight.shape[0] // heads
    if k_weight.shape[0] % size or heads % (k_weight.shape[0] // size):
        raise ValueError(f"{k_weight.shape[0]} key rows do not fit {heads} heads of {size} rows")
    kv_heads = k_weight.shape[0] // size
    largest_H = max_logits_H.float()
    gamma_H = (tau / largest_H.clamp_min(1e-30)).clamp_max(1.0)
    gamma_H = gamma_H.where(largest_H.isfinite(), 1.0)
    k_scale_K = gamma_H.view(kv_heads, -1).amin(dim=1).sqrt()
    q_scale_H = gamma_H / k_scale_K.repeat_interleave(heads // kv_heads)
    q_weight.mul_(q_scale_H.repeat_interleave(size)[:, None].to(q_weight.dtype))
    k_weight.mul_(k_scale_K.repeat_interleave(size)[:, None].to(k_weight.dtype))
    return gamma_H
