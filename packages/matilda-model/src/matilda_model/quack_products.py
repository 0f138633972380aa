"""quack-kernels (CuTe DSL, Hopper): matmuls with ping-pong warp groups, ReLU² or residual inside.

One warp group multiplies while the other runs its epilogue, and the activation that backward reads
is fetched by the copy engine meanwhile; Triton's kernels expose that read. Weights' gradients stay
with cuBLAS, which splits their long sum over the multiprocessors. Needs `quack-kernels`; compiled
on first use, seconds a kernel, and kept in quack's own cache.

Shape suffixes: N tokens, D model, F feed-forward, X whatever a product's width is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matilda_model.device import name_user
from matilda_model.second_derivative import refuse_second_derivative


class Epilogues(NamedTuple):
    """What quack does with a product before it is stored."""

    product: Callable[..., Any]
    relu2: Callable[..., Any]
    relu2_backward: Callable[..., Any]
    residual: Callable[..., Any]


@functools.cache
def epilogues() -> Epilogues:
    """The four matmuls, compiled on first use. ImportError without `quack-kernels`."""
    name_user()
    from cutlass import cute  # type: ignore[import-not-found]
    from quack.activation import relu  # type: ignore[import-not-found]
    from quack.epilogue import gemm_epilogue  # type: ignore[import-not-found]

    @gemm_epilogue()
    def product_epilogue(acc):  # type: ignore[no-untyped-def]
        return {"D": acc}

    @gemm_epilogue()
    def relu2_epilogue(acc):  # type: ignore[no-untyped-def]
        r = relu(acc)
        return {"D": r * r}

    @gemm_epilogue()
    def relu2_backward_epilogue(acc, c):  # type: ignore[no-untyped-def]
        return {"D": acc * (cute.math.sqrt(c, fastmath=True) * 2.0)}

    @gemm_epilogue()
    def residual_epilogue(acc, c):  # type: ignore[no-untyped-def]
        return {"D": acc + c}

    return Epilogues(product_epilogue, relu2_epilogue, relu2_backward_epilogue, residual_epilogue)


TILE_N = 192
_LONG_SUM = 2048
"""From this inner dimension on, 256 x 192 tiles win: up's gradient by a tenth (docs/LOG.md)."""


@functools.cache
def config(
    tile_m: int = 128,
    tile_n: int = TILE_N,
    pingpong: bool = True,
    cluster_m: int = 2,
    cluster_n: int = 1,
) -> Any:
    """One of quack's tile shapes, statically scheduled."""
    from quack.gemm_config import GemmConfig  # type: ignore[import-not-found]

    return GemmConfig(
        tile_m=tile_m,
        tile_n=tile_n,
        pingpong=pingpong,
        cluster_m=cluster_m,
        cluster_n=cluster_n,
        is_dynamic_persistent=False,
    )


def tile_width(width: int) -> int:
    """Columns of a tile: a whole number of tiles where there is one.

    1280, a joint q, k, v product, is 8 of 160.
    """
    return 160 if width % TILE_N and width % 160 == 0 else TILE_N


def product_config(inner: int, width: int) -> Any:
    """The tiles for a plain product that sums over `inner`, `width` columns wide."""
    if inner >= _LONG_SUM and width % TILE_N == 0:
        return config(tile_m=256, pingpong=False, cluster_m=1, cluster_n=2)
    return config(tile_n=tile_width(width))


@torch.library.custom_op("matilda_model::quack_product", mutates_args=())
def quack_product(a_NX: Tensor, b_XF: Tensor) -> Tensor:
    """`a @ b`, bf16 [N, F]; `b` may be a transposed view."""
    out = a_NX.new_empty(a_NX.shape[0], b_XF.shape[1])
    chosen = product_config(*b_XF.shape)
    epilogues().product(a_NX.contiguous(), b_XF, out={"D": out}, config=chosen, tuned=False)
    return out


@quack_product.register_fake
def _(a_NX: Tensor, b_XF: Tensor) -> Tensor:
    return a_NX.new_empty(a_NX.shape[0], b_XF.shape[1])


@torch.library.custom_op("matilda_model::quack_up_relu2", mutates_args=())
def quack_up_relu2(x_ND: Tensor, up_FD: Tensor) -> Tensor:
    """`relu(x @ up.T) ** 2`, bf16 [N, F]."""
    out = x_ND.new_empty(x_ND.shape[0], up_FD.shape[0])
    epilogues().relu2(x_ND.contiguous(), up_FD.T, out={"D": out}, config=config(), tuned=False)
    return out


@quack_up_relu2.register_fake
def _(x_ND: Tensor, up_FD: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], up_FD.shape[0])


@torch.library.custom_op("matilda_model::quack_down_relu2_backward", mutates_args=())
def quack_down_relu2_backward(dy_ND: Tensor, down_DF: Tensor, h_NF: Tensor) -> Tensor:
    """Gradient before the activation: `(dy @ down) * 2 * sqrt(h)`, bf16 [N, F]."""
    out = torch.empty_like(h_NF)
    epilogues().relu2_backward(
        dy_ND.contiguous(), down_DF, h_NF, out={"D": out}, config=config(), tuned=False
    )
    return out


@quack_down_relu2_backward.register_fake
def _(dy_ND: Tensor, down_DF: Tensor, h_NF: Tensor) -> Tensor:
    return torch.empty_like(h_NF)


@torch.library.custom_op("matilda_model::quack_linear_add", mutates_args=())
def quack_linear_add(x_NF: Tensor, weight_DF: Tensor, residual_ND: Tensor) -> Tensor:
    """`residual + x @ weight.T`, bf16 [N, D], rounded once."""
    out = torch.empty_like(residual_ND)
    epilogues().residual(
        x_NF.contiguous(), weight_DF.T, residual_ND, out={"D": out}, config=config(), tuned=False
    )
    return out


@quack_linear_add.register_fake
def _(x_NF: Tensor, weight_DF: Tensor, residual_ND: Tensor) -> Tensor:
    return torch.empty_like(residual_ND)


class QuackLinear(torch.autograd.Function):
    """`x @ weight.T` for bf16 [N, D] and [F, D]."""

    @staticmethod
    def forward(ctx, x_ND, weight_FD):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_ND, weight_FD)
        return quack_product(x_ND, weight_FD.T)

    @staticmethod
    def backward(ctx, dy_NF):  # type: ignore[no-untyped-def]
        refuse_second_derivative()
        x_ND, weight_FD = ctx.saved_tensors
        return quack_product(dy_NF, weight_FD), dy_NF.T @ x_ND


class QuackReLU2(torch.autograd.Function):
    """`relu(x @ up.T) ** 2 @ down.T` for bf16 [N, D], plus a residual [N, D] unless it is None.

    `everywhere` has quack compute the gradient of `x`, too.
    """

    @staticmethod
    def forward(ctx, x_ND, up_FD, down_DF, residual_ND, everywhere):  # type: ignore[no-untyped-def]
        h_NF = quack_up_relu2(x_ND, up_FD)
        ctx.save_for_backward(x_ND, up_FD, down_DF, h_NF)
        ctx.added, ctx.everywhere = residual_ND is not None, everywhere
        if residual_ND is None:
            return h_NF @ down_DF.T
        return quack_linear_add(h_NF, down_DF, residual_ND)

    @staticmethod
    def backward(ctx, dy_ND):  # type: ignore[no-untyped-def]
        refuse_second_derivative()
        x_ND, up_FD, down_DF, h_NF = ctx.saved_tensors
        du_NF = quack_down_relu2_backward(dy_ND, down_DF, h_NF)
        residual = dy_ND if ctx.added else None
        dx_ND = quack_product(du_NF, up_FD) if ctx.everywhere else du_NF @ up_FD
        return dx_ND, du_NF.T @ x_ND, dy_ND.T @ h_NF, residual, None


class QuackLinearAdd(torch.autograd.Function):
    """`residual + x @ weight.T` for bf16 [N, F], [D, F] and [N, D]; see `QuackReLU2`."""

    @staticmethod
    def forward(ctx, x_NF, weight_DF, residual_ND, everywhere):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_NF, weight_DF)
        ctx.everywhere = everywhere
        return quack_linear_add(x_NF, weight_DF, residual_ND)

    @staticmethod
    def backward(ctx, dy_ND):  # type: ignore[no-untyped-def]
        refuse_second_derivative()
        x_NF, weight_DF = ctx.saved_tensors
        dx_NF = quack_product(dy_ND, weight_DF) if ctx.everywhere else dy_ND @ weight_DF
        return dx_NF, dy_ND.T @ x_NF, dy_ND, None
