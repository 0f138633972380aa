"""The pure-torch Muon step: any device, any memory format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matilda_optim.blocks import ClassKey, block_spec, blocks_of, class_key
from matilda_optim.coefficients import resolve_coefficients
from matilda_optim.learning_rate import lr_ratio
from matilda_optim.orthogonalize import NS_DTYPES, default_ns_dtype, newton_schulz, normalize_

Work = list[tuple[dict[str, Any], list[Tensor]]]
"""Groups, each with those of its parameters that have a gradient."""


def reference_step(work: Work, states: dict[Tensor, dict[str, Any]]) -> None:
    """One Muon step of the parameters in `work`."""
    updates: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]] = []
    classes: dict[ClassKey, list[tuple[Tensor, float]]] = {}
    for group, params in work:
        directions = _momentum_step(group, params, states)
        updates.append((group, params, directions))
        spec = block_spec(group)
        quintics = resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
        for direction in directions:
            if direction.numel() == 0:
                continue
            dtype = NS_DTYPES.get(group["ns_dtype"] or "") or default_ns_dtype(direction.device)
            for block in blocks_of(direction, spec):
                key = class_key(block, dtype, quintics)
                ratio = lr_ratio(group["adjust_lr_fn"], *block.shape)
                classes.setdefault(key, []).append((block, ratio))
    for key, members in classes.items():
        _orthogonalize_class(key, members)
    for group, params, directions in updates:
        _apply(group, params, directions)


def _momentum_step(
    group: dict[str, Any], params: list[Tensor], states: dict[Tensor, dict[str, Any]]
) -> list[Tensor]:
    """Advances the momentum and returns the fp32 directions, fresh contiguous tensors."""
    beta = group["momentum"]
    grads = [p.grad.float() for p in params if p.grad is not None]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    buffers = [states[p]["momentum_buffer"] for p in params]
    torch._foreach_lerp_(buffers, grads, 1 - beta)
    if group["nesterov"]:
        directions = list(torch._foreach_lerp(grads, buffers, beta))
        return [d.contiguous() for d in directions]
    return [b.clone(memory_format=torch.contiguous_format) for b in buffers]


def _orthogonalize_class(key: ClassKey, members: list[tuple[Tensor, float]]) -> None:
    """Replaces each member block by ratio × its orthogonalisation, as one batch."""
    wide = [block if block.shape[0] <= block.shape[1] else block.mT for block, _ in members]
    x_BMN = torch.stack(wide)
    normalize_(x_BMN)
    out_BMN = newton_schulz(x_BMN.to(key.ns_dtype), key.quintics)
    for view, (_, ratio), out_MN in zip(wide, members, out_BMN.unbind(0), strict=True):
        torch.mul(out_MN.float(), ratio, out=view)


def _apply(group: dict[str, Any], params: list[Tensor], directions: list[Tensor]) -> None:
    lr, decay = group["lr"], group["weight_decay"]
    masters = [p if p.dtype == torch.float32 else p.float() for p in params]
    if decay != 0:
        torch._foreach_mul_(masters, 1 - lr * decay)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(directions, lr)
        torch._foreach_sub_(masters, directions)
    else:
        torch._foreach_add_(masters, directions, alpha=-lr)
    for p, master in zip(params, masters, strict=True):
        if master is not p:
            p.copy_(master)
