"""The pure-torch Muon step: any device, any memory format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from matilda_optim.blocks import ClassKey, block_spec, blocks_of, class_key
from matilda_optim.coefficients import resolve_coefficients
from matilda_optim.learning_rate import lr_ratio
from matilda_optim.newton_schulz import (
    NS_DTYPES,
    default_ns_dtype,
    newton_schulz,
    normalize_,
    workspace,
)
from matilda_optim.normuon import normalize_neurons

Work = list[tuple[dict[str, Any], list[Tensor]]]
"""Groups, each with those of its parameters that have a gradient."""

Share = Callable[..., Tensor]
"""`share(function, x_BMN, …)` runs a function of batches, possibly on several ranks."""


def reference_step(work: Work, states: dict[Tensor, dict[str, Any]], share: Share) -> None:
    """One Muon step of the parameters in `work`."""
    updates: list[tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor] | None]] = []
    for group, params in work:
        grads = [p.grad for p in params if p.grad is not None]
        buffers = [states[p]["momentum_buffer"] for p in params]
        directions, kept = momentum_step(group, params, grads, buffers)
        updates.append((group, params, directions, kept))
    orthogonalize_blocks(
        [(group, d) for group, _, directions, _ in updates for d in directions], share
    )
    for group, params, directions, kept in updates:
        if group["normuon_beta2"] is not None:
            normalize_neurons(group, directions, [states[p] for p in params], block_spec(group))
        apply_update(group, params, directions, kept)


def momentum_step(
    group: dict[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Advances the momentum; returns the directions, fresh contiguous tensors of its dtype.

    Under `nonfinite="skip"` the second result masks, per parameter, what may change: a block whose
    gradient is not finite keeps its momentum, gets a zero direction and a zero mask.
    """
    beta = group["momentum"]
    grads = [g.to(b.dtype) for g, b in zip(grads, buffers, strict=True)]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    masks: list[Tensor] | None = None
    if group["nonfinite"] == "skip":
        masks = [_finite_blocks(group, g) for g in grads]
        # lerp towards the buffer itself leaves it as it is
        grads = [torch.where(m > 0, g, b) for g, b, m in zip(grads, buffers, masks, strict=True)]
    torch._foreach_lerp_(list(buffers), grads, 1 - beta)
    if group["nesterov"]:
        directions = list(torch._foreach_lerp(grads, list(buffers), beta))
        directions = [d.contiguous() for d in directions]
    else:
        directions = [b.clone(memory_format=torch.contiguous_format) for b in buffers]
    if masks is not None:
        torch._foreach_mul_(directions, masks)
    return directions, masks


def _finite_blocks(group: dict[str, Any], grad: Tensor) -> Tensor:
    """1 where the element's block is finite, 0 elsewhere; fp32, of the gradient's shape."""
    mask = torch.empty_like(grad, memory_format=torch.contiguous_format)
    spec = block_spec(group)
    flat = grad.contiguous()
    for view, block in zip(blocks_of(mask, spec), blocks_of(flat, spec), strict=True):
        view.copy_(torch.isfinite(block).all().to(mask.dtype).expand_as(view))
    return mask


def orthogonalize_blocks(directions: Sequence[tuple[dict[str, Any], Tensor]], share: Share) -> None:
    """Replaces every block of the directions by ratio × its orthogonalisation, class by class."""
    classes: dict[ClassKey, list[tuple[Tensor, float]]] = {}
    for group, direction in directions:
        if direction.numel() == 0:
            continue
        quintics = resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
        dtype = NS_DTYPES.get(group["ns_dtype"] or "") or default_ns_dtype(direction.device)
        for block in blocks_of(direction, block_spec(group)):
            key = class_key(block, dtype, quintics)
            ratio = lr_ratio(group["adjust_lr_fn"], *block.shape)
            classes.setdefault(key, []).append((block, ratio))
    for key, members in classes.items():
        _orthogonalize_class(key, members, share)


def _orthogonalize_class(key: ClassKey, members: list[tuple[Tensor, float]], share: Share) -> None:
    wide = [block if block.shape[0] <= block.shape[1] else block.mT for block, _ in members]
    x_BMN = workspace(wide)
    normalize_(x_BMN)
    out_BMN = share(lambda x: newton_schulz(x, key.quintics), x_BMN.to(key.ns_dtype))
    out_BMN = out_BMN[:, : key.rows, : key.cols]
    for view, (_, ratio), out_MN in zip(wide, members, out_BMN.unbind(0), strict=True):
        torch.mul(out_MN.to(view.dtype), ratio, out=view)


def apply_update(
    group: dict[str, Any],
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
) -> None:
    """Decay and update; 16-bit parameters are rounded once."""
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())  # of one element, in any shape
    masters = [p if p.dtype in (torch.float32, torch.float64) else p.float() for p in params]
    if decay != 0:
        _decay(group, masters, directions, masks, lr * decay)
    if isinstance(lr, Tensor):
        torch._foreach_mul_(list(directions), lr.to(masters[0].device))
        torch._foreach_sub_(masters, list(directions))
    else:
        torch._foreach_add_(masters, list(directions), alpha=-lr)
    for p, master in zip(params, masters, strict=True):
        if master is not p:
            p.copy_(master)


def _decay(
    group: dict[str, Any],
    masters: list[Tensor],
    directions: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    amount: float | Tensor,
) -> None:
    """p ← (1 - amount)·p, everywhere or where the group's options allow it."""
    if masks is None and not group["cautious"]:
        torch._foreach_mul_(masters, 1 - amount)
        return
    for i, (master, direction) in enumerate(zip(masters, directions, strict=True)):
        allowed = torch.ones_like(master) if masks is None else masks[i].view_as(master).clone()
        if group["cautious"]:
            allowed.mul_(master * direction > 0)
        master.mul_(1 - amount * allowed)
