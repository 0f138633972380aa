"""What an optimizer can say about its matrices, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matilda_optim.blocks import block_spec, blocks_of
from matilda_optim.learning_rate import lr_ratio
from matilda_optim.newton_schulz import orthogonalize


@torch.no_grad()
def matrix_metrics(
    groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]]
) -> dict[str, dict[str, Tensor]]:
    """Per Muon group, 0-d tensors on the device; see `Muon.metrics`."""
    report: dict[str, dict[str, Tensor]] = {}
    for i, group in enumerate(groups):
        if group["algorithm"] != "muon":
            continue
        rows = []
        for param in group["params"]:
            momentum = states[param]["momentum_buffer"]
            if hasattr(momentum, "full_tensor"):
                momentum = momentum.full_tensor()
                param = param.full_tensor()
            spec = block_spec(group)
            pairs = zip(
                blocks_of(momentum.contiguous(), spec),
                blocks_of(param.detach().contiguous(), spec),
                strict=True,
            )
            rows += [_of_matrix(group, m, p) for m, p in pairs if m.numel()]
        if rows:
            table = torch.stack(rows)
            valid = table[:, 5] > 0
            count = valid.sum().clamp_min(1)
            mean = torch.where(valid[:, None], table, torch.zeros_like(table)).sum(0) / count
            name = group.get("name", f"group {i}")
            report[f"{name} ({i})" if name in report else name] = {
                "update_rms": mean[0],
                "update_to_param": mean[1],
                "sigma2_mean": mean[2],
                "sigma2_spread": mean[3],
                "effective_rank": mean[4],
                "zero_or_nonfinite": (~valid).sum(),
            }
    return report


def _of_matrix(group: dict[str, Any], momentum: Tensor, param: Tensor) -> Tensor:
    out = orthogonalize(
        momentum, coefficients=group["ns_coefficients"], steps=group["ns_steps"]
    ).float()
    wide = out if out.shape[0] <= out.shape[1] else out.mT
    gram = wide @ wide.mT
    count = gram.shape[0]
    mean = gram.diagonal().sum() / count
    spread = (gram.square().sum() / count - mean.square()).clamp_min(0).sqrt()
    source = momentum.float()
    source = source if source.shape[0] <= source.shape[1] else source.mT
    source = source / torch.linalg.vector_norm(source)
    rank = 1.0 / (source @ source.mT).square().sum()
    rms = lr_ratio(group["adjust_lr_fn"], *momentum.shape) * out.square().mean().sqrt()
    lr = group["lr"]
    step = rms * (lr.reshape(()) if isinstance(lr, Tensor) else lr)
    relative = step / param.float().square().mean().sqrt().clamp_min(1e-12)
    valid = torch.isfinite(rank).float()
    return torch.stack([rms, relative, mean, spread, rank, valid])
