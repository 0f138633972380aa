"""Newton–Schulz orthogonalisation of a batch of matrices, in pure torch.

Shape suffixes: B matrices of a class, M rows ≤ N columns (tall matrices arrive transposed).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from matilda_optim.coefficients import Quintic, resolve_coefficients

NS_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Names of the dtypes that the iterations can run in."""

_ALIGN = 16

# The Gram form pays from this aspect ratio on: 17·M³ + 4·M²N against 5·(4·M²N + 2·M³) operations.
_GRAM_ASPECT = 2.0


def workspace(matrices: Sequence[Tensor]) -> Tensor:
    """The equally shaped wide matrices as one fp32 (or fp64) batch, padded by zeros.

    Both sides grow to multiples of 16, so that every matrix of a batch is aligned alike and its
    result does not depend on its neighbours. The padding stays zero through any odd polynomial.
    """
    rows, cols = matrices[0].shape
    shape = (len(matrices), -(-rows // _ALIGN) * _ALIGN, -(-cols // _ALIGN) * _ALIGN)
    dtype = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
    if shape[1:] == (rows, cols):
        return torch.stack([m.to(dtype) for m in matrices])
    x_BMN = torch.zeros(shape, dtype=dtype, device=matrices[0].device)
    for x_MN, matrix in zip(x_BMN.unbind(0), matrices, strict=True):
        x_MN[:rows, :cols] = matrix
    return x_BMN


def normalize_(x_BMN: Tensor) -> Tensor:
    """Divides each fp32 matrix by its Frobenius norm in place; returns the norms, fp64 (B,).

    Scale invariant bit for bit under powers of two: each matrix is first brought to a largest
    entry in [0.5, 1) by an exact power of two. A zero matrix stays zero. NaN or Inf anywhere makes
    that matrix NaN and no other.
    """
    _, exponent_B = torch.frexp(x_BMN.abs().amax(dim=(-2, -1)))
    exponent_B = exponent_B.clamp_(-126, 126)
    scale_B = torch.exp2(-exponent_B.to(x_BMN.dtype))
    x_BMN.mul_(scale_B[:, None, None])
    # row norms in fp32, their norm in fp64: accurate for any size and nearly free
    row_BM = torch.linalg.vector_norm(x_BMN, dim=-1)
    norm_B = torch.linalg.vector_norm(row_BM, dim=-1, dtype=torch.float64)
    inverse_B = torch.where(norm_B == 0, norm_B, norm_B.reciprocal())
    x_BMN.mul_(inverse_B.to(x_BMN.dtype)[:, None, None])
    return torch.mul(norm_B, torch.exp2(exponent_B.double()))


def newton_schulz(x_BMN: Tensor, quintics: Sequence[Quintic]) -> Tensor:
    """Applies the quintics to normalised matrices with M ≤ N; same shape and dtype returned."""
    m, n = x_BMN.shape[-2:]
    if x_BMN.dtype in (torch.float32, torch.float64) and n >= _GRAM_ASPECT * m:
        return _gram_form(x_BMN, quintics)
    for a, b, c in quintics:
        gram_BMM = torch.bmm(x_BMN, x_BMN.mT)
        poly_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        x_BMN = torch.baddbmm(x_BMN, poly_BMM, x_BMN, beta=a)
    return x_BMN


def _gram_form(x_BMN: Tensor, quintics: Sequence[Quintic]) -> Tensor:
    """The same polynomial through R = XXᵀ: only the first and last products touch N.

    R squares the spectrum, so half the digits of σ are left: fine in fp32 (σ down to 3e-4 of σ₁),
    not in 16 bits without a restart.
    """
    r_BMM = torch.bmm(x_BMN, x_BMN.mT)
    q_BMM: Tensor | None = None
    for step, (a, b, c) in enumerate(quintics):
        h_BMM = torch.baddbmm(r_BMM, r_BMM, r_BMM, beta=b, alpha=c)
        h_BMM.diagonal(dim1=-2, dim2=-1).add_(a)
        q_BMM = h_BMM if q_BMM is None else torch.bmm(h_BMM, q_BMM)
        if step + 1 < len(quintics):
            r_BMM = torch.bmm(torch.bmm(h_BMM, r_BMM), h_BMM)
    return x_BMN if q_BMM is None else torch.bmm(q_BMM, x_BMN)


def default_ns_dtype(device: torch.device) -> torch.dtype:
    """fp16 on CUDA (8× less rounding noise than bf16 at the same rate), bf16 on other accelerators,
    fp32 on CPU."""
    if device.type == "cuda":
        return torch.float16
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@torch.no_grad()
def orthogonalize(
    matrix: Tensor,
    *,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "polar_express",
    steps: int = 5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The approximate polar factor U·Vᵀ of `matrix` = U·S·Vᵀ, by Newton–Schulz.

    Args:
        matrix: (..., rows, cols), any floating dtype; leading dimensions are a batch.
        coefficients: as `resolve_coefficients`.
        steps: iterations.
        dtype: of the iterations; None is fp16 on CUDA, fp32 on CPU.

    Returns:
        A new tensor of `matrix`'s shape and dtype, without gradient, its singular values near 1. A
        zero matrix gives zeros; a matrix with NaN or Inf gives NaN, without touching the rest of
        the batch.

    Raises:
        ValueError: fewer than two dimensions, no floating dtype, or bad coefficients.
    """
    if not matrix.is_floating_point():
        raise ValueError(f"`matrix` needs a floating dtype, got {matrix.dtype}")
    if matrix.ndim < 2:
        raise ValueError(f"`matrix` needs two dimensions, got shape {tuple(matrix.shape)!r}")
    quintics = resolve_coefficients(coefficients, steps)
    if matrix.numel() == 0:
        return torch.empty_like(matrix)
    tall = matrix.shape[-2] > matrix.shape[-1]
    source = matrix.double() if dtype == torch.float64 else matrix.float()
    wide = (source.mT if tall else source).flatten(0, -3) if matrix.ndim > 2 else None
    blocks = [source.mT if tall else source] if wide is None else list(wide.unbind(0))
    rows, cols = blocks[0].shape
    x_BMN = workspace(blocks)
    normalize_(x_BMN)
    out = newton_schulz(x_BMN.to(dtype or default_ns_dtype(matrix.device)), quintics)
    out = out[:, :rows, :cols].reshape(*matrix.shape[:-2], rows, cols).to(matrix.dtype)
    return (out.mT if tall else out).contiguous()
