"""The output head around the fused cross-entropy: no float32 logits, and never all logits.

Rows go through the head in chunks; each chunk's logits become their gradient in place, and the
gradient's two matmuls follow at once. Those are cuBLAS's; the logits' may be quack's. Importing
this module needs triton.

With the head `"fp8"` its product and its gradient for `h` multiply in 8 bits (Hopper or later).
Hidden states and weights are e4m3 with one scale a tensor. Of the logits' gradient the
probabilities are e5m2, whose range they need, and the target's entry, nearly -1 in every row, is
kept out and added in bf16: rounded to 8 bits it would be off in the same direction in all of them.
The weights' gradient stays bf16.

Shape suffixes: N tokens, D model, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matilda_model.triton_cross_entropy import E5M2_SCALE, cross_entropy_

_CHUNK_ROWS = 16384  # 1.6 GB of bf16 logits at 50304; the matmuls are no faster with more rows
_E4M3_MAX = 448.0


@torch.library.custom_op("matilda_model::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    h_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    softcap: float | None,
    z_loss: float,
    with_grad: bool,
    head: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed cross-entropy, summed z-loss, their gradients for `h` (its dtype) and `w` (float32).

    The gradients are empty without `with_grad`. `w_VD` has the dtype of `h_ND`: bf16 for the heads
    `"fp8"` and `"quack"`; `"cublas"` takes any. A target that exceeds the vocabulary is a
    RuntimeError, on a GPU when it is next waited for.
    """
    # the kernel reads and writes at a target's place; asserted on the device, where nobody waits
    torch._assert_async(
        (targets_N < w_VD.shape[0]).all(),
        f"a target exceeds the vocabulary: give ids of 0..{w_VD.shape[0] - 1}, or -1 to ignore one",
    )
    dh_ND = torch.empty_like(h_ND) if with_grad else h_ND.new_empty(0)
    dw_VD = w_VD.new_empty(w_VD.shape if with_grad else (0,), dtype=torch.float32)
    products: _Head = _Head(h_ND, w_VD)
    if head == "fp8":
        products = _Fp8Head(h_ND, w_VD, with_grad)
    elif head == "quack":
        products = _QuackHead(h_ND, w_VD)
    ce, zl = [], []
    for start in range(0, h_ND.shape[0], _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        logits = products.logits(rows)
        targets = targets_N[rows]
        grad8 = products.gradient_buffers(logits) if with_grad else None
        ce_N, z_N = cross_entropy_(
            logits, targets, softcap=softcap, z_loss=z_loss, with_grad=with_grad, grad8=grad8
        )
        ce.append(ce_N)
        zl.append(z_N)
        if with_grad:
            products.hidden_gradient_(dh_ND[rows], logits, grad8, targets)
            _add_weight_gradient(dw_VD, logits, h_ND[rows], first=start == 0)
        del logits, grad8  # the next chunk takes their memory
    return torch.cat(ce).sum(), torch.cat(zl).sum(), dh_ND, dw_VD


Grad8 = tuple[Tensor, Tensor]


class _Head:
    """The two products around the loss: logits, and the gradient for the hidden states."""

    def __init__(self, h_ND: Tensor, w_VD: Tensor) -> None:
        self.h_ND, self.w_VD = h_ND, w_VD

    def logits(self, rows: slice) -> Tensor:
        return self.h_ND[rows] @ self.w_VD.T

    def gradient_buffers(self, logits: Tensor) -> Grad8 | None:
        return None

    def hidden_gradient_(
        self, dh_ND: Tensor, dlogits: Tensor, grad8: Grad8 | None, targets_N: Tensor
    ) -> None:
        torch.mm(dlogits, self.w_VD, out=dh_ND)


class _QuackHead(_Head):
    """The logits by quack, which is the faster of the two there and not for the gradient."""

    def logits(self, rows: slice) -> Tensor:
        from matilda_model.quack_products import quack_product

        product: Tensor = quack_product(self.h_ND[rows], self.w_VD.T)
        return product


class _Fp8Head(_Head):
    """The same in 8 bits; see the top of this file."""

    def __init__(self, h_ND: Tensor, w_VD: Tensor, with_grad: bool) -> None:
        super().__init__(h_ND, w_VD)
        self.h8_ND, self.h_scale = _to_e4m3(h_ND)
        self.w8_VD, self.w_scale = _to_e4m3(w_VD)
        # 8-bit products want the summed dimension contiguous in both operands
        self.w8_DV = self.w8_VD.T.contiguous() if with_grad else self.w8_VD
        self.grad_scale = torch.full((), 1.0 / E5M2_SCALE.value, device=h_ND.device)

    def logits(self, rows: slice) -> Tensor:
        return torch._scaled_mm(
            self.h8_ND[rows],
            self.w8_VD.T,
            scale_a=self.h_scale,
            scale_b=self.w_scale,
            out_dtype=self.h_ND.dtype,
            use_fast_accum=True,
        )

    def gradient_buffers(self, logits: Tensor) -> Grad8:
        n_rows = logits.shape[0]
        return (
            torch.empty_like(logits, dtype=torch.float8_e5m2),
            torch.empty(n_rows, dtype=torch.float32, device=logits.device),
        )

    def hidden_gradient_(
        self, dh_ND: Tensor, dlogits: Tensor, grad8: Grad8 | None, targets_N: Tensor
    ) -> None:
        assert grad8 is not None
        others_NV, target_N = grad8
        others_ND = torch._scaled_mm(
            others_NV,
            self.w8_DV.T,
            scale_a=self.grad_scale,
            scale_b=self.w_scale,
            out_dtype=dh_ND.dtype,
            use_fast_accum=False,  # a sum over the vocabulary needs its float32
        )
        rows_ND = self.w_VD[targets_N.clamp_min(0)]
        torch.addcmul(others_ND, rows_ND, target_N[:, None].to(rows_ND.dtype), out=dh_ND)


def _to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` in e4m3 with its largest element at the end of the range, and the scale to undo it."""
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dtype=torch.float32)
    scale = largest.clamp_min(1e-12) / _E4M3_MAX
    return (x * (1.0 / scale)).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn), scale


def _add_weight_gradient(dw_VD: Tensor, dlogits: Tensor, h: Tensor, *, first: bool) -> None:
    """`dw += dlogits.T @ h` with a float32 sum and no bf16 rounding between chunks."""
    if h.dtype == torch.float32 or h.device.type != "cuda":
        product = (dlogits.T @ h).float()
        dw_VD.copy_(product) if first else dw_VD.add_(product)
    elif first:
        torch.mm(dlogits.T, h, out_dtype=torch.float32, out=dw_VD)
    else:
        torch.addmm(dw_VD, dlogits.T, h, out_dtype=torch.float32, out=dw_VD)


@linear_cross_entropy_op.register_fake
def _(
    h_ND: Tensor,
    w_VD: Tensor,
    targets_N: Tensor,
    softcap: float | None,
    z_loss: float,
    with_grad: bool,
    head: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalar = h_ND.new_empty((), dtype=torch.float32)
    dh_ND = torch.empty_like(h_ND) if with_grad else h_ND.new_empty(0)
    dw_VD = w_VD.new_empty(w_VD.shape if with_grad else (0,), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), dh_ND, dw_VD
