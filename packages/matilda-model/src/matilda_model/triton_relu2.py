"""Triton: the two MLP matmuls of ReLU² with the activation in their epilogues (Hopper, TMA).

Forward writes `h = relu(x @ up.T) ** 2` alone; backward turns `dy @ down` into the gradient before
the activation with `2 * sqrt(h)`, so the pre-activation is neither written nor read. The other
four products of the MLP stay cuBLAS. Importing this module needs triton.

Shape suffixes: N tokens, D model, F feed-forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from matilda_model.second_derivative import refuse_second_derivative

_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 256, 64
_STAGES_FORWARD, _STAGES_BACKWARD, _WARPS = 4, 3, 8


@triton.jit  # type: ignore[untyped-decorator]
def _matmul_relu2_kernel(  # type: ignore[no-untyped-def]
    a_desc,  # [M, K]
    b_desc,  # [N, K] forward, [K, N] backward
    c_desc,  # [M, N] written in halves of BLOCK_N
    h_desc,  # [M, N] backward: the activation
    M,
    N,
    K,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    N_PROGRAMS: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    group = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, N_PROGRAMS, flatten=True):
        first_m = (tile // group) * GROUP_M
        size_m = min(tiles_m - first_m, GROUP_M)
        row = (first_m + (tile % size_m)) * BLOCK_M
        col = ((tile % group) // size_m) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(tiles_k):
            a = a_desc.load([row, k * BLOCK_K])
            if BACKWARD:
                acc = tl.dot(a, b_desc.load([k * BLOCK_K, col]), acc)
            else:
                acc = tl.dot(a, b_desc.load([col, k * BLOCK_K]).T, acc)
        # halves: the staging buffer of the store leaves room for one more pipeline stage
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        if BACKWARD:
            # both loads in flight before either is used
            h_left = h_desc.load([row, col])
            h_right = h_desc.load([row, col + BLOCK_N // 2])
            left = left * 2.0 * tl.sqrt(h_left.to(tl.float32))
            c_desc.store([row, col], left.to(c_desc.dtype))
            right = right * 2.0 * tl.sqrt(h_right.to(tl.float32))
            c_desc.store([row, col + BLOCK_N // 2], right.to(c_desc.dtype))
        else:
            left = tl.maximum(left, 0.0)
            c_desc.store([row, col], (left * left).to(c_desc.dtype))
            right = tl.maximum(right, 0.0)
            c_desc.store([row, col + BLOCK_N // 2], (right * right).to(c_desc.dtype))


def launch(
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    *,
    blocks: tuple[int, int, int] = (_BLOCK_M, _BLOCK_N, _BLOCK_K),
    stages: int,
    warps: int = _WARPS,
    group: int = 8,
) -> Tensor:
    """One of the two products: forward when `h` is None. All bf16 and contiguous."""
    backward = h is not None
    m, k = a.shape
    n = b.shape[1] if backward else b.shape[0]
    block_m, block_n, block_k = blocks
    out = torch.empty(m, n, dtype=a.dtype, device=a.device)
    a_desc = TensorDescriptor.from_tensor(a, [block_m, block_k])
    b_desc = TensorDescriptor.from_tensor(b, [block_k, block_n] if backward else [block_n, block_k])
    half = [block_m, block_n // 2]
    c_desc = TensorDescriptor.from_tensor(out, half)
    h_desc = c_desc if h is None else TensorDescriptor.from_tensor(h, half)
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    _matmul_relu2_kernel[(min(programs, tiles),)](
        a_desc,
        b_desc,
        c_desc,
        h_desc,
        m,
        n,
        k,
        BACKWARD=backward,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=group,
        N_PROGRAMS=programs,
        num_stages=stages,
        num_warps=warps,
    )
    return out


@torch.library.custom_op("matilda_model::up_relu2", mutates_args=())
def up_relu2(x_ND: Tensor, up_FD: Tensor) -> Tensor:
    """`relu(x @ up.T) ** 2`, bf16 [N, F]."""
    return launch(x_ND.contiguous(), up_FD.contiguous(), None, stages=_STAGES_FORWARD)


@up_relu2.register_fake
def _(x_ND: Tensor, up_FD: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], up_FD.shape[0])


@torch.library.custom_op("matilda_model::down_relu2_backward", mutates_args=())
def down_relu2_backward(dy_ND: Tensor, down_DF: Tensor, h_NF: Tensor) -> Tensor:
    """Gradient before the activation: `(dy @ down) * 2 * sqrt(h)`, bf16 [N, F]."""
    return launch(dy_ND.contiguous(), down_DF.contiguous(), h_NF, stages=_STAGES_BACKWARD)


@down_relu2_backward.register_fake
def _(dy_ND: Tensor, down_DF: Tensor, h_NF: Tensor) -> Tensor:
    return torch.empty_like(h_NF)


class FusedReLU2(torch.autograd.Function):
    """`relu(x @ up.T) ** 2 @ down.T` for bf16 [N, D] with both activations fused."""

    @staticmethod
    def forward(ctx, x_ND, up_FD, down_DF):  # type: ignore[no-untyped-def]
        h_NF = up_relu2(x_ND, up_FD)
        ctx.save_for_backward(x_ND, up_FD, down_DF, h_NF)
        return h_NF @ down_DF.T

    @staticmethod
    def backward(ctx, dy_ND):  # type: ignore[no-untyped-def]
        refuse_second_derivative()
        x_ND, up_FD, down_DF, h_NF = ctx.saved_tensors
        du_NF = down_relu2_backward(dy_ND, down_DF, h_NF)
        return du_NF @ up_FD, du_NF.T @ x_ND, dy_ND.T @ h_NF
