"""The AdamW step of groups with `algorithm="adamw"`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

# not "cpu": torch's fused CPU kernel rounds a vector's tail differently, so its bits depend on how
# a parameter is sharded
_FUSED_DEVICES = ("cuda", "mps", "xpu")


def master_dtype(param: Tensor) -> torch.dtype:
    """What state and arithmetic of a parameter have: fp32, or fp64 for fp64."""
    return torch.promote_types(param.dtype, torch.float32)


def init_adamw_state(state: dict[str, Any], param: Tensor) -> None:
    """Fills `state` with `step` (fp32, on the parameter's device) and the moments."""
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = torch.zeros_like(
            param, dtype=master_dtype(param), memory_format=torch.preserve_format
        )


def adamw_step(group: dict[str, Any], states: dict[Tensor, dict[str, Any]]) -> None:
    """One decoupled-decay Adam step (Loshchilov and Hutter, arXiv 1711.05101) of `group`.

    fp32 and fp64 parameters go through torch's own code, fused on CUDA, so they equal
    `torch.optim.AdamW` bit for bit. 16-bit parameters are updated in fp32 from fp32 moments and
    rounded once. With `nonfinite="skip"` a NaN or Inf in any gradient of the group leaves the whole
    group as it was, parameters, moments and step count; on a GPU without waiting for it.
    """
    for fused in (True, False):
        owners = [
            p
            for p in group["params"]
            if p.grad is not None and (p.device.type in _FUSED_DEVICES) is fused
        ]
        if not owners:
            continue
        masters = [p if p.dtype == master_dtype(p) else p.detach().float() for p in owners]
        grads = [p.grad.to(master_dtype(p)) for p in owners]
        found_inf = _found_inf(grads) if group["nonfinite"] == "skip" else None
        if found_inf is not None and not fused and bool(found_inf):
            continue
        rows = [states[p] for p in owners]
        _torch_step(masters, grads, group, rows, fused, found_inf if fused else None)
        for p, master in zip(owners, masters, strict=True):
            if master is not p:
                p.copy_(master)


def _found_inf(grads: list[Tensor]) -> Tensor:
    """1.0 if any element of any rank's part is not finite, else 0.0: fp32, on the device."""
    largest = torch.zeros((), device=grads[0].device)
    for sharded in (False, True):
        part = [g for g in grads if hasattr(g, "full_tensor") is sharded]
        if part:
            norm: Any = torch.nn.utils.get_total_norm(part, norm_type=float("inf"))
            # the sum of two norms, so that neither hides the other's NaN
            largest = largest + (norm.full_tensor() if sharded else norm)
    return (~torch.isfinite(largest)).float()


def _torch_step(
    params: list[Tensor],
    grads: list[Tensor],
    group: dict[str, Any],
    rows: list[dict[str, Any]],
    fused: bool,
    found_inf: Tensor | None,
) -> None:
    beta1, beta2 = group["betas"]
    torch_adamw(
        params,
        grads,
        [row["exp_avg"] for row in rows],
        [row["exp_avg_sq"] for row in rows],
        [],
        [row["step"] for row in rows],
        fused=fused,
        found_inf=found_inf,
        foreach=False,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
