"""quack-kernels: a block's RMSNorms as parts of the products around them; no pass of their own.

`norm(x) @ W.T` is `r * (x @ (w W).T)` with the norm's weight `w` in the columns of `W` and a factor
`r = rsqrt(mean(x²) + eps)` for each row: the product before, which writes `x`, sums its squares,
and the product after scales its rows. Backward, with `t` the sum over a row of output times its
gradient, `x` gets `(r dz) @ (w W) - t r² x / D`: again sums of one product and a term of the next.

That a row's factor may wait for the next product is the "deferred rstd" of quack's own library of
epilogues (`epilogue/library.py`). The factor is a function of `x` alone, its gradient is counted
where it is used: the sums of squares carry none. Needs `quack-kernels`; attention needs
`flash-attn-4`, too.

Shape suffixes: N tokens, D model, F feed-forward, X whatever a product's width is, C its tiles,
B batch, T sequence, J query, key and value heads together, E head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matilda_model.device import name_user
from matilda_model.flash4 import fa4_backward_tiled, fa4_forward
from matilda_model.quack_products import TILE_N, config, quack_product, tile_width
from matilda_model.second_derivative import refuse_second_derivative


class FoldedEpilogues(NamedTuple):
    """What quack does with a product before it is stored."""

    scaled: Callable[..., Any]
    scaled_relu2: Callable[..., Any]
    residual_squares: Callable[..., Any]
    relu2_backward: Callable[..., Any]
    norm_gradient: Callable[..., Any]


@functools.cache
def epilogues() -> FoldedEpilogues:
    """The five matmuls, compiled on first use. ImportError without `quack-kernels`."""
    name_user()
    from cutlass import cute  # type: ignore[import-not-found]
    from quack.activation import relu  # type: ignore[import-not-found]
    from quack.epilogue import gemm_epilogue  # type: ignore[import-not-found]
    from quack.epilogue.ops import ColVecLoad, ColVecReduce  # type: ignore[import-not-found]

    @gemm_epilogue(ops={"r": ColVecLoad("r")})
    def scaled_epilogue(acc, r):  # type: ignore[no-untyped-def]
        return {"D": acc * r}

    @gemm_epilogue(ops={"r": ColVecLoad("r")})
    def scaled_relu2_epilogue(acc, r):  # type: ignore[no-untyped-def]
        y = relu(acc * r)
        return {"D": y * y}

    @gemm_epilogue(reduces={"squares": ColVecReduce("squares", scaled=True)})
    def residual_squares_epilogue(acc, c):  # type: ignore[no-untyped-def]
        y = acc + c
        return {"D": y, "squares": (y, y)}

    @gemm_epilogue(
        ops={"r2": ColVecLoad("r2")},
        reduces={"half_dots": ColVecReduce("half_dots", scaled=True)},
    )
    def folded_relu2_backward_epilogue(acc, c, r2):  # type: ignore[no-untyped-def]
        # c is u² for the scaled u, so du is 2 acc u and du u is 2 acc c: both twos wait outside,
        # where they cost nothing
        return {"D": acc * cute.math.sqrt(c, fastmath=True) * r2, "half_dots": (acc, c)}

    @gemm_epilogue(ops={"along": ColVecLoad("along")})
    def norm_gradient_epilogue(acc, c, x, along):  # type: ignore[no-untyped-def]
        return {"D": acc + c + x * along}

    return FoldedEpilogues(
        scaled_epilogue,
        scaled_relu2_epilogue,
        residual_squares_epilogue,
        folded_relu2_backward_epilogue,
        norm_gradient_epilogue,
    )


def _config(width: int = TILE_N) -> Any:
    """Tiles of 128 rows; two neighbours in a row of tiles fetch their rows once (docs/LOG.md)."""
    return config(tile_n=tile_width(width), cluster_m=1, cluster_n=2)


def _partials(rows_NX: Tensor) -> Tensor:
    """A column of float32 sums for each of `_config()`'s tiles of a product of that shape."""
    tiles = -(-rows_NX.shape[1] // TILE_N)
    return rows_NX.new_empty(rows_NX.shape[0], tiles, dtype=torch.float32)


@torch.library.custom_op("matilda_model::quack_scaled_product", mutates_args=())
def scaled_product(a_NX: Tensor, b_XF: Tensor, scale_N: Tensor) -> Tensor:
    """`scale[:, None] * (a @ b)`, bf16 [N, F], from a float32 scale; `b` may be transposed."""
    out = a_NX.new_empty(a_NX.shape[0], b_XF.shape[1])
    epilogues().scaled(
        a_NX.contiguous(),
        b_XF,
        out={"D": out},
        r=scale_N[None],
        config=_config(b_XF.shape[1]),
        tuned=False,
    )
    return out


@scaled_product.register_fake
def _(a_NX: Tensor, b_XF: Tensor, scale_N: Tensor) -> Tensor:
    return a_NX.new_empty(a_NX.shape[0], b_XF.shape[1])


@torch.library.custom_op("matilda_model::quack_scaled_up_relu2", mutates_args=())
def scaled_up_relu2(x_ND: Tensor, up_FD: Tensor, scale_N: Tensor) -> Tensor:
    """`relu(scale[:, None] * (x @ up.T)) ** 2`, bf16 [N, F], from a float32 scale."""
    out = x_ND.new_empty(x_ND.shape[0], up_FD.shape[0])
    epilogues().scaled_relu2(
        x_ND.contiguous(), up_FD.T, out={"D": out}, r=scale_N[None], config=_config(), tuned=False
    )
    return out


@scaled_up_relu2.register_fake
def _(x_ND: Tensor, up_FD: Tensor, scale_N: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], up_FD.shape[0])


@torch.library.custom_op("matilda_model::quack_linear_add_squares", mutates_args=())
def linear_add_squares(
    x_NF: Tensor, weight_DF: Tensor, residual_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """`residual + x @ weight.T`, bf16 [N, D], and sums of its squares, float32 [N, C]."""
    out = torch.empty_like(residual_ND)
    squares_NC = _partials(out)
    epilogues().residual_squares(
        x_NF.contiguous(),
        weight_DF.T,
        residual_ND,
        out={"D": out},
        squares=squares_NC,
        config=_config(),
        tuned=False,
    )
    return out, squares_NC


@linear_add_squares.register_fake
def _(x_NF: Tensor, weight_DF: Tensor, residual_ND: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual_ND), _partials(residual_ND)


@torch.library.custom_op("matilda_model::quack_scaled_relu2_backward", mutates_args=())
def scaled_relu2_backward(
    dy_ND: Tensor, down_DF: Tensor, h_NF: Tensor, scale_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of what `scaled_up_relu2` scaled, bf16 [N, F], for its result `h`.

    Second, half of the sums over a row of scaled product times its gradient, float32 [N, C].
    """
    out = torch.empty_like(h_NF)
    half_dots_NC = _partials(out)
    epilogues().relu2_backward(
        dy_ND.contiguous(),
        down_DF,
        h_NF,
        out={"D": out},
        r2=2 * scale_N[None],
        half_dots=half_dots_NC,
        config=_config(),
        tuned=False,
    )
    return out, half_dots_NC


@scaled_relu2_backward.register_fake
def _(dy_ND: Tensor, down_DF: Tensor, h_NF: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h_NF), _partials(h_NF)


@torch.library.custom_op("matilda_model::quack_norm_gradient", mutates_args=())
def norm_gradient(
    dz_NF: Tensor, weight_FD: Tensor, dpast_ND: Tensor, x_ND: Tensor, along_N: Tensor
) -> Tensor:
    """`dz @ weight + dpast + along[:, None] * x`, bf16 [N, D]; `along` is float32."""
    out = torch.empty_like(dpast_ND)
    epilogues().norm_gradient(
        dz_NF.contiguous(),
        weight_FD,
        dpast_ND.contiguous(),
        out={"D": out},
        x=x_ND,
        along=along_N[None],
        config=_config(),
        tuned=False,
    )
    return out


@norm_gradient.register_fake
def _(dz_NF: Tensor, weight_FD: Tensor, dpast_ND: Tensor, x_ND: Tensor, along_N: Tensor) -> Tensor:
    return torch.empty_like(dpast_ND)


def _row_scale(squares_N: Tensor, dim: int, eps: float) -> Tensor:
    return torch.rsqrt(squares_N / dim + eps)


class FoldedReLU2(torch.autograd.Function):
    """`x + relu(norm(x) @ up.T) ** 2 @ down.T` and the sum of squares of its rows, float32 [N].

    For bf16 `x` [N, D], the float32 sums of squares of its rows [N], `up` [F, D] with the norm's
    weight in its columns, `down` [D, F] and the norm's eps.
    """

    @staticmethod
    def forward(ctx, x_ND, squares_N, up_FD, down_DF, eps):  # type: ignore[no-untyped-def]
        scale_N = _row_scale(squares_N, x_ND.shape[1], eps)
        h_NF = scaled_up_relu2(x_ND, up_FD, scale_N)
        y_ND, squares_NC = linear_add_squares(h_NF, down_DF, x_ND)
        ctx.save_for_backward(x_ND, scale_N, up_FD, down_DF, h_NF)
        squares_N = squares_NC.sum(1)
        ctx.mark_non_differentiable(squares_N)
        return y_ND, squares_N

    @staticmethod
    def backward(ctx, dy_ND, _):  # type: ignore[no-untyped-def]
        refuse_second_derivative()
        x_ND, scale_N, up_FD, down_DF, h_NF = ctx.saved_tensors
        dz_NF, half_dots_NC = scaled_relu2_backward(dy_ND, down_DF, h_NF, scale_N)
        along_N = half_dots_NC.sum(1) * scale_N.square() * (-2 / x_ND.shape[1])
        dx_ND = norm_gradient(dz_NF, up_FD, dy_ND, x_ND, along_N)
        return dx_ND, None, dz_NF.T @ x_ND, dy_ND.T @ h_NF, None


class FoldedAttention4(torch.autograd.Function):
    """`x + o(attention(norm(x)))` and the sum of squares of its rows, float32 [N].

    For bf16 `x` [B, T, D], the float32 sums of squares of its rows [N], the joined weights of q, k
    and v [J E, D] with the norm's weight in their columns, weights of QK-norm, the RoPE table, the
    output's weight [D, H E], numbers of heads, the norm's eps and QK-norm's.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x_BTD,
        squares_N,
        joint_XD,
        q_weight,
        k_weight,
        cos,
        sin,
        o_DX,
        n_heads,
        n_kv_heads,
        eps,
        qk_eps,
    ):
        from matilda_model.triton_qkv import qk_norm_rope, values

        x_ND = x_BTD.flatten(0, 1)
        scale_N = _row_scale(squares_N, x_ND.shape[1], eps)
        qkv_BTX = scaled_product(x_ND, joint_XD.T, scale_N).view(*x_BTD.shape[:2], -1)
        q, k = qk_norm_rope(qkv_BTX, q_weight, k_weight, cos, sin, n_heads, n_kv_heads, qk_eps)
        out_BTHE, lse = fa4_forward(q, k, values(qkv_BTX, n_heads, n_kv_heads))
        y_ND, squares_NC = linear_add_squares(out_BTHE.flatten(0, 1).flatten(1), o_DX, x_ND)
        ctx.save_for_backward(
            x_ND, scale_N, joint_XD, o_DX, q, k, out_BTHE, lse, qkv_BTX, q_weight, k_weight, cos,
            sin,
        )  # fmt: skip
        ctx.heads, ctx.qk_eps = (n_heads, n_kv_heads), qk_eps
        squares_N = squares_NC.sum(1)
        ctx.mark_non_differentiable(squares_N)
        return y_ND.view(x_BTD.shape), squares_N

    @staticmethod
    def backward(ctx, dy_BTD, _):  # type: ignore[no-untyped-def]
        refuse_second_derivative()
        from matilda_model.triton_qkv import values
        from matilda_model.triton_qkv_tiles import qkv_norm_rope_backward_folded

        x_ND, scale_N, joint_XD, o_DX, q, k, out_BTHE, lse, *product = ctx.saved_tensors
        v = values(product[0], *ctx.heads)
        dy_ND, out_NX = dy_BTD.flatten(0, 1), out_BTHE.flatten(0, 1).flatten(1)
        dout_BTHE = quack_product(dy_ND, o_DX).view(out_BTHE.shape)
        tiles = fa4_backward_tiled(q, k, v, out_BTHE, dout_BTHE, lse)
        dqkv, dweight, dots_JN = qkv_norm_rope_backward_folded(
            *tiles, *product, ctx.qk_eps, scale_N
        )
        dz_NX = dqkv.flatten(0, 1)
        along_N = dots_JN.sum(0) * scale_N.square() / -x_ND.shape[1]
        dx_ND = norm_gradient(dz_NX, joint_XD, dy_ND, x_ND, along_N)
        return (
            dx_ND.view(dy_BTD.shape), None, dz_NX.T @ x_ND, dweight[0], dweight[1], None, None,
            dy_ND.T @ out_NX, None, None, None, None,
        )  # fmt: skip
