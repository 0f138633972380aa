"""The small parts: a casting linear layer, RMSNorm, rotary positions, the two MLPs.

Master weights are float32; each layer computes in the dtype of its input, so the dtype of the
residual stream decides and autocast is not needed.

Shape suffixes: B batch, T sequence, D model, H heads, E head dim, F feed-forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from matilda_model.config import ModelConfig
from matilda_model.device import has_hopper_triton, has_quack, has_triton


class Linear(nn.Linear):
    """`x @ weight.T` without bias, in the dtype of `x`; the weight [d_out, d_in] stays float32.

    An `nn.Linear` to whoever looks at the module tree: optimizers that group by owner, wrappers.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self) -> None:
        """Left to `Transformer.init_weights`, which sets every parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def are_bare(*layers: nn.Module) -> bool:
    """Whether calling these layers is multiplying by their weights and nothing more.

    Not so for what has replaced a `Linear` (an adapter, a quantised or sharded layer) and for one
    with hooks: such a layer must be called.
    """
    return all(type(layer) is Linear and not has_hooks(layer) for layer in layers)


def has_hooks(layer: nn.Module) -> bool:
    """Whether someone waits for this layer to be called."""
    forward = layer._forward_hooks or layer._forward_pre_hooks
    return bool(forward or layer._backward_hooks or layer._backward_pre_hooks)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019), in float32.

    Input and output have the same dtype; reduction, scaling and the learned weight are float32.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return branching_rms_norm(x, self.weight, self.eps, "plain")[0]

    def branch(self, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        """The norm of `x`, and `x` for the residual stream; see `branching_rms_norm`."""
        if not x.is_cuda or has_hooks(self):
            return self(x), x
        return branching_rms_norm(x, self.weight, self.eps, backend)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"


def branching_rms_norm(
    x: Tensor, weight_D: Tensor, eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`RMSNorm` of `x`, and `x` for the residual stream that goes on past it.

    Where `backend`, a config's `norm`, allows it, one kernel adds the gradients of both.
    """
    weight_D = weight_D.float()  # itself, unless the model was cast
    fuses = x.is_cuda and x.requires_grad and weight_D.requires_grad and backend != "plain"
    asked = backend in ("fused", "folded")
    if fuses and (asked or (x.dtype == torch.bfloat16 and has_triton())):
        from matilda_model.triton_norm import BranchingRMSNorm

        y, past = BranchingRMSNorm.apply(x, weight_D, eps)
        return y, past
    return F.rms_norm(x.float(), weight_D.shape, weight_D, eps).to(x.dtype), x


def rope_table(
    seq_len: int, head_dim: int, theta: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency: two float32 tensors [seq_len, head_dim / 2].

    Frequency i is `theta ** (-2 i / head_dim)` (Su et al. 2021); computed in float64.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    position = torch.arange(seq_len, dtype=torch.float64, device=device)
    angle = position[:, None] * (theta**-exponent)[None, :]
    return angle.cos().float(), angle.sin().float()


def apply_rope(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + E/2) of every head by its position's angle: the Llama/Qwen layout.

    `cos` and `sin` broadcast against [B, T, H, E/2]; the result has their precision.
    """
    first, second = x_BTHE.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.d_model, config.resolved_d_ff)
        self.up = Linear(config.d_model, config.resolved_d_ff)
        self.down = Linear(config.resolved_d_ff, config.d_model)

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor | None = None) -> Tensor:
        """The MLP of `x_BTD`, plus `residual_BTD` when given."""
        out: Tensor = self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return out if residual_BTD is None else residual_BTD + out


class ReLU2(nn.Module):
    """`down(relu(up(x)) ** 2)` (So et al. 2021, Primer)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.matmul = config.matmul
        self.up = Linear(config.d_model, config.resolved_d_ff)
        self.down = Linear(config.resolved_d_ff, config.d_model)

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor | None = None) -> Tensor:
        """The MLP of `x_BTD`, plus `residual_BTD` when given."""
        if not are_bare(self.up, self.down):
            out: Tensor = self.down(F.relu(self.up(x_BTD)).square())
            return out if residual_BTD is None else residual_BTD + out
        dtype = x_BTD.dtype
        up, down = self.up.weight.to(dtype), self.down.weight.to(dtype)
        return self.product(x_BTD, up, down, residual_BTD)

    def product(
        self, x_BTD: Tensor, up_FD: Tensor, down_DF: Tensor, residual_BTD: Tensor | None = None
    ) -> Tensor:
        """The MLP with the given weights, plus the residual, by the chosen kernels."""
        kind = self.kind(x_BTD)
        y_ND: Tensor
        if kind == "plain":
            y_BTD = F.linear(F.relu(F.linear(x_BTD, up_FD)).square(), down_DF)
        elif kind in ("quack", "quack_residual", "quack_all"):
            from matilda_model.quack_products import QuackReLU2

            added_ND = None
            if kind != "quack" and residual_BTD is not None:
                added_ND, residual_BTD = residual_BTD.flatten(0, 1), None
            everywhere = kind == "quack_all"
            y_ND = QuackReLU2.apply(x_BTD.flatten(0, 1), up_FD, down_DF, added_ND, everywhere)
            y_BTD = y_ND.view(x_BTD.shape)
        else:
            from matilda_model.triton_relu2 import FusedReLU2

            y_ND = FusedReLU2.apply(x_BTD.flatten(0, 1), up_FD, down_DF)
            y_BTD = y_ND.view(x_BTD.shape)
        return y_BTD if residual_BTD is None else residual_BTD + y_BTD

    def kind(self, x_BTD: Tensor) -> str:
        """The back end for this input; `"auto"` by what was measured fastest (docs/LOG.md)."""
        if self.matmul == "plain" or x_BTD.device.type != "cuda" or not x_BTD.requires_grad:
            return "plain"
        if self.matmul != "auto":
            return self.matmul
        if x_BTD.dtype == torch.bfloat16 and has_quack():
            return "quack_all"
        return "fused" if x_BTD.dtype == torch.bfloat16 and has_hopper_triton() else "plain"
