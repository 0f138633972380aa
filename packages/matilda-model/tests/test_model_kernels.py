"""The Triton kernels against float64: by Triton's interpreter anywhere, compiled on a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

FULL = os.environ.get("MATILDA_SLOW") == "1"
INTERPRETED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_model_kernels as suite
suite.multiprocessors_for_the_interpreter()
for check in (*suite.CHECKS, *suite.CHECKS_THAT_END_A_GPU):
    getattr(suite, check)("cpu", torch.float32)
"""
CHECKS = (
    "check_cross_entropy",
    "check_nan_is_not_hidden",
    "check_linear_cross_entropy",
    "check_relu2",
    "check_rms_norm",
    "check_qkv_norm_rope",
    "check_qkv_norm_rope_from_tiles",
)
CHECKS_THAT_END_A_GPU = ("check_targets_outside_the_vocabulary",)  # no kernel runs after an assert
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9),
    reason="needs a Hopper or later GPU",
)


def test_every_kernel_equals_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton, which torch brings on Linux x86-64")
    pytest.importorskip("numpy", reason="triton's interpreter computes with numpy")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, os.path.dirname(__file__)],  # noqa: PTH120
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_kernel_equals_float64_on_the_gpu(check: str) -> None:
    globals()[check]("cuda", torch.bfloat16)


def multiprocessors_for_the_interpreter() -> None:
    class Device:
        multi_processor_count = 3

    torch.cuda.get_device_properties = lambda _: Device  # type: ignore[assignment,misc,return-value]


def error(got: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def bound(dtype: torch.dtype) -> float:
    return 5e-6 if dtype == torch.float32 else 4e-3


def reference_loss(
    logits: Tensor, targets: Tensor, softcap: float | None, z_loss: float
) -> tuple[Tensor, Tensor]:
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse, valid = z.logsumexp(-1), targets >= 0
    target = z.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    return (lse - target) * valid, z_loss * lse.square() * valid


def check_cross_entropy(device: str, dtype: torch.dtype) -> None:
    from matilda_model.triton_cross_entropy import cross_entropy_

    torch.manual_seed(0)
    n = 6 if device == "cuda" else 4  # the interpreter takes a tenth of a second for each row
    for vocab in (300, 257):
        for softcap in (None, 5.0, 100.0):  # 100 is too large for the sum without a maximum
            x = (4 * torch.randn(n, vocab, device=device)).to(dtype)
            x[0, :2] = torch.tensor([1000.0, -1000.0])  # far beyond the soft-cap
            targets = torch.randint(0, vocab, (n,), device=device)
            targets[2] = -1
            exact = x.double().requires_grad_()
            ce, zl = reference_loss(exact, targets, softcap, 1e-2)
            (ce + zl).sum().backward()
            got = x.clone()
            got_ce, got_zl = cross_entropy_(
                got, targets, softcap=softcap, z_loss=1e-2, with_grad=True, block=128
            )
            assert exact.grad is not None
            assert error(got_ce, ce.detach()) < 5e-6
            assert error(got_zl, zl.detach()) < 5e-6
            assert error(got, exact.grad) < bound(dtype)
            assert (got[2] == 0).all()
            # logits that share a reciprocal; tanh computed once a logit or twice
            ways = ((2, True), (2, False), (1, True)) if FULL or device == "cuda" else ()
            for shared, kept in (*ways, (4, False)):
                other = x.clone()
                other_ce, other_zl = cross_entropy_(
                    other,
                    targets,
                    softcap=softcap,
                    z_loss=1e-2,
                    with_grad=True,
                    block=128,
                    shared=shared,
                    kept=kept,
                )
                assert error(other_ce, ce.detach()) < 5e-6
                assert error(other_zl, zl.detach()) < 5e-6
                assert error(other, exact.grad) < bound(dtype)
            if vocab == 300 or device == "cuda":
                check_gradient_in_8_bits(x, targets, softcap)
            untouched = x.clone()
            again, _ = cross_entropy_(
                untouched, targets, softcap=softcap, z_loss=1e-2, with_grad=False, block=128
            )
            assert torch.equal(again, got_ce)
            assert torch.equal(untouched, x)


def check_gradient_in_8_bits(x: Tensor, targets: Tensor, softcap: float | None) -> None:
    from matilda_model.triton_cross_entropy import cross_entropy_

    exact = x.double().requires_grad_()
    torch.cat(reference_loss(exact, targets, softcap, 1e-3)).sum().backward()
    rest = torch.empty(*x.shape, dtype=torch.float8_e5m2, device=x.device)
    own = torch.empty(len(x), device=x.device)
    cross_entropy_(
        x.clone(),
        targets,
        softcap=softcap,
        z_loss=1e-3,
        with_grad=True,
        grad8=(rest, own),
        block=128,
    )
    index = targets.clamp_min(0)[:, None]
    assert error(own[:, None], exact.grad.gather(1, index) * (targets >= 0)[:, None]) < 1e-5
    expected_rest = exact.grad.scatter(1, index, 0.0)
    off = (rest.double() / 2**12 - expected_rest).abs()
    right = off <= expected_rest.abs() / 7.9 + 1e-8  # two bits of mantissa
    if x.device.type == "cpu":  # triton's interpreter loses some carries, and float32's subnormals
        right |= expected_rest.abs().frexp().mantissa > 1.87 / 2
        right |= expected_rest.abs() < 1e-37
    assert right.all()
    assert (rest.double().gather(1, index) == 0).all()
    assert (rest[2].double() == 0).all()


def check_nan_is_not_hidden(device: str, dtype: torch.dtype) -> None:
    from matilda_model.triton_cross_entropy import cross_entropy_

    for softcap in (None, 30.0):
        x = torch.randn(2, 64, device=device).to(dtype)
        x[0, 5] = float("nan")
        targets = torch.tensor([1, 2], device=device)
        for shared, kept in ((1, False), (4, False), (4, True)):
            y = x.clone()
            ce, _ = cross_entropy_(
                y,
                targets,
                softcap=softcap,
                z_loss=0.0,
                with_grad=True,
                block=64,
                shared=shared,
                kept=kept,
            )
            assert torch.isnan(ce[0])
            assert torch.isnan(y[0]).all()
            assert torch.isfinite(ce[1])
            assert torch.isfinite(y[1]).all()


def check_linear_cross_entropy(device: str, dtype: torch.dtype) -> None:
    from matilda_model import linear_cross_entropy, triton_loss

    torch.manual_seed(0)
    n_rows, chunk = (40, 16) if device == "cuda" else (20, 8)  # three chunks, the last one short
    triton_loss._CHUNK_ROWS = chunk
    h = torch.randn(n_rows, 32, device=device).to(dtype).requires_grad_()
    w = (0.3 * torch.randn(96, 32, device=device)).requires_grad_()
    targets = torch.randint(0, 96, (n_rows,), device=device)
    targets[::7] = -1
    targets[::14] = -100  # torch's own mark of an ignored target
    exact_h, exact_w = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    ce, zl = reference_loss(exact_h @ exact_w.T, targets, 5.0, 1e-3)
    n = (targets >= 0).sum()
    expected = torch.autograd.grad(3.0 * (ce + zl).sum() / n, (exact_h, exact_w))
    out = linear_cross_entropy(h, w, targets, softcap=5.0, z_loss=1e-3, backend="fused")
    got = torch.autograd.grad(3.0 * out.loss, (h, w))
    wide = 5 * bound(dtype)  # the logits are rounded to bf16 too
    assert error(out.ce, ce.sum() / n) < wide
    assert error(out.z_loss, zl.sum() / n) < wide
    assert error(got[0], expected[0]) < wide
    assert error(got[1], expected[1]) < wide
    with torch.no_grad():
        value = linear_cross_entropy(h, w, targets, softcap=5.0, z_loss=1e-3, backend="fused")
    assert torch.equal(value.loss, out.loss)


def check_targets_outside_the_vocabulary(device: str, dtype: torch.dtype) -> None:
    from matilda_model import linear_cross_entropy
    from matilda_model.triton_loss import linear_cross_entropy_op

    h = torch.ones(3, 16, device=device, dtype=dtype, requires_grad=True)
    w = torch.ones(40, 16, device=device, requires_grad=True)
    for softcap in (None, 5.0):
        for wrong in (40, 41, 2**40):
            for context in (torch.enable_grad, torch.no_grad):
                targets = torch.tensor([39, wrong, -1], device=device)
                with context(), pytest.raises(RuntimeError, match=r"give ids of 0\.\.39"):
                    linear_cross_entropy(h, w, targets, softcap=softcap, backend="fused")
    targets = torch.tensor([39, 0, -(2**40)], device=device)
    out = linear_cross_entropy(h, w, targets, backend="fused")
    torch.testing.assert_close(out.loss.item(), math.log(40.0))
    # what compilers ask of an operator: its fake agrees, and it changes no argument
    torch.library.opcheck(
        linear_cross_entropy_op,
        (h.detach(), w.detach(), targets, 5.0, 1e-3, True, "cublas"),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(h, w, targets, backend="fused").loss, out.loss)
    targets = torch.tensor([39, 40, -1], device=device)
    with pytest.raises(RuntimeError, match="a target exceeds the vocabulary"):
        compiled(h, w, targets, backend="fused")


@needs_gpu
@pytest.mark.gpu
def test_the_8_bit_head_is_as_close_as_8_bits_allow_and_unbiased() -> None:
    from matilda_model import linear_cross_entropy, triton_loss

    torch.manual_seed(0)
    triton_loss._CHUNK_ROWS = 1024
    h = torch.randn(2500, 256, device="cuda").bfloat16().requires_grad_()
    w = (0.1 * torch.randn(4096, 256, device="cuda")).requires_grad_()
    targets = torch.randint(0, 4096, (2500,), device="cuda")
    targets[::7] = -1
    exact_h, exact_w = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    ce, zl = reference_loss(exact_h @ exact_w.T, targets, 30.0, 1e-3)
    n = (targets >= 0).sum()
    expected = torch.autograd.grad((ce + zl).sum() / n, (exact_h, exact_w))
    out = linear_cross_entropy(h, w, targets, softcap=30.0, z_loss=1e-3, backend="fused_fp8")
    got = torch.autograd.grad(out.loss, (h, w))
    assert abs(float(out.ce) - float(ce.sum() / n)) < 5e-3
    assert error(got[0], expected[0]) < 0.05
    assert error(got[1], expected[1]) < 0.05
    for ours, theirs in zip(got, expected, strict=True):  # the length along the true direction
        along = (ours.double() * theirs).sum() / theirs.square().sum()
        assert abs(float(along) - 1) < 5e-3
    assert (got[0][::7] == 0).all()
    value = linear_cross_entropy(
        h.detach(), w.detach(), targets, softcap=30.0, z_loss=1e-3, backend="fused_fp8"
    )
    assert torch.equal(value.ce, out.ce)


def check_relu2(device: str, dtype: torch.dtype) -> None:
    from matilda_model import triton_relu2

    triton_relu2._STAGES_FORWARD = triton_relu2._STAGES_BACKWARD = 1 if device == "cpu" else 3
    torch.manual_seed(0)
    x = torch.randn(200, 128, device=device).to(dtype).requires_grad_()
    up = (0.1 * torch.randn(256, 128, device=device)).to(dtype).requires_grad_()
    down = (0.1 * torch.randn(128, 256, device=device)).to(dtype).requires_grad_()
    dy = torch.randn(200, 128, device=device).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, up, down)]
    expected = torch.relu(exact[0] @ exact[1].T).square() @ exact[2].T
    y = triton_relu2.FusedReLU2.apply(x, up, down)
    assert error(y, expected) < bound(dtype)
    for got, want in zip(
        torch.autograd.grad(y, (x, up, down), dy),
        torch.autograd.grad(expected, exact, dy.double()),
        strict=True,
    ):
        assert error(got, want) < bound(dtype)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("added", "everywhere"), [(False, False), (True, False), (True, True)])
def test_quack_products_equal_float64_on_the_gpu(added: bool, everywhere: bool) -> None:
    pytest.importorskip("quack", reason="needs the quack-kernels package")
    from matilda_model.quack_products import QuackLinear, QuackLinearAdd, QuackReLU2

    torch.manual_seed(0)
    x, up, down, residual, dy = (
        (scale * torch.randn(*shape, device="cuda")).bfloat16().requires_grad_()
        for scale, shape in (
            (1.0, (520, 256)),
            (0.1, (768, 256)),
            (0.1, (256, 768)),
            (1.0, (520, 256)),
            (1.0, (520, 256)),
        )
    )
    leaves = (x, up, down, residual) if added else (x, up, down)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.relu(exact[0] @ exact[1].T).square() @ exact[2].T
    if added:
        expected = expected + exact[3]
    y = QuackReLU2.apply(x, up, down, residual if added else None, everywhere)
    assert error(y, expected) < bound(torch.bfloat16)
    for got, want in zip(
        torch.autograd.grad(y, leaves, dy),
        torch.autograd.grad(expected, exact, dy.double()),
        strict=True,
    ):
        assert error(got, want) < bound(torch.bfloat16)
    square = (0.1 * torch.randn(256, 256, device="cuda")).bfloat16().requires_grad_()
    out = QuackLinearAdd.apply(x, square, residual, everywhere)
    assert error(out, residual.double() + x.double() @ square.double().T) < bound(torch.bfloat16)
    for width in (768, 1280, 320):  # tiles of 192, of 160, and neither
        wide = (0.1 * torch.randn(width, 256, device="cuda")).bfloat16().requires_grad_()
        seed = torch.randn(520, width, device="cuda").bfloat16()
        product = QuackLinear.apply(x, wide)
        assert error(product, x.double() @ wide.double().T) < bound(torch.bfloat16)
        dx, dwide = torch.autograd.grad(product, (x, wide), seed)
        assert error(dx, seed.double() @ wide.double()) < bound(torch.bfloat16)
        assert error(dwide, seed.double().T @ x.double()) < bound(torch.bfloat16)


def check_rms_norm(device: str, dtype: torch.dtype) -> None:
    from matilda_model.triton_norm import BranchingRMSNorm

    torch.manual_seed(0)
    x = torch.randn(2, 7, 48, device=device).to(dtype).requires_grad_()
    weight = (1 + 0.3 * torch.randn(48, device=device)).requires_grad_()
    seeds = [torch.randn(2, 7, 48, device=device).to(dtype) for _ in range(2)]
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    mean = exact[0].square().mean(-1, keepdim=True)
    expected = exact[0] * torch.rsqrt(mean + 1e-2) * exact[1], exact[0]
    got = BranchingRMSNorm.apply(x, weight, 1e-2)
    assert error(got[0], expected[0]) < bound(dtype)
    assert torch.equal(got[1], x)
    for a, b in zip(
        torch.autograd.grad(got, (x, weight), seeds),
        torch.autograd.grad(expected, exact, [seed.double() for seed in seeds]),
        strict=True,
    ):
        assert error(a, b) < bound(dtype)


def check_qkv_norm_rope(device: str, dtype: torch.dtype) -> None:
    from matilda_model.layers import apply_rope, rope_table
    from matilda_model.triton_qkv import FusedQKVNormRope, qk_norm_rope, values

    torch.manual_seed(0)
    batch, seq_len, heads, kv, e = 2, 9, 4, 2, 16
    cos, sin = rope_table(seq_len, e, 100.0, torch.device(device))
    qkv = torch.randn(batch, seq_len, (heads + 2 * kv) * e, device=device).to(dtype)
    inputs = [qkv, 1 + 0.3 * torch.randn(e, device=device), 1 + 0.3 * torch.randn(e, device=device)]
    grads = [torch.randn(batch, n, seq_len, e, device=device) for n in (heads, kv, kv)]

    def run(function: Callable[..., tuple[Tensor, ...]], kind: torch.dtype | None) -> list[Tensor]:
        leaves = [t.detach().to(kind or t.dtype).requires_grad_() for t in inputs]
        out = function(*leaves)
        seeds = [g.transpose(1, 2).to(o.dtype) for g, o in zip(grads, out, strict=True)]
        return [*out, *torch.autograd.grad(out, leaves, seeds)]

    def textbook(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.view(batch, seq_len, -1, e).split([heads, kv, kv], dim=2)
        q, k = (
            apply_rope(
                x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight,
                cos.double()[:, None],
                sin.double()[:, None],
            )
            for x, weight in ((q, q_weight), (k, k_weight))
        )
        return q, k, v

    def fused(*leaves: Tensor) -> tuple[Tensor, ...]:
        q, k, v = FusedQKVNormRope.apply(*leaves, cos, sin, heads, kv, 1e-6)
        return q, k, v

    for got, want in zip(run(fused, None), run(textbook, torch.float64), strict=True):
        assert error(got, want) < bound(dtype)
    q, k, v = fused(*inputs)
    apart = qk_norm_rope(*inputs, cos, sin, heads, kv, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(apart, (q, k), strict=True))
    assert torch.equal(values(qkv, heads, kv), v)


def check_qkv_norm_rope_from_tiles(device: str, dtype: torch.dtype) -> None:
    from matilda_model.layers import rope_table
    from matilda_model.triton_qkv import qkv_norm_rope_backward
    from matilda_model.triton_qkv_tiles import (
        qkv_norm_rope_backward_folded,
        qkv_norm_rope_backward_tiled,
    )

    torch.manual_seed(0)
    batch, seq_len, heads, kv, e = 1, 128, 2, 1, 16
    cos, sin = rope_table(seq_len, e, 100.0, torch.device(device))
    qkv = torch.randn(batch, seq_len, (heads + 2 * kv) * e, device=device).to(dtype)
    rest = qkv, *(1 + 0.3 * torch.randn(2, e, device=device)), cos, sin, 0.3
    dq, dk, dv = (torch.randn(batch, seq_len, n, e, device=device) for n in (heads, kv, kv))
    want = qkv_norm_rope_backward(dq / 4, dk / 4, dv, *rest)
    tiles = [as_tiles(d) for d in (dq, dk, dv)]
    got = qkv_norm_rope_backward_tiled(*tiles, *rest)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-6
    scale = torch.rand(batch * seq_len, device=device)
    dqkv, dweight, dots = qkv_norm_rope_backward_folded(*tiles, *rest, scale)
    assert error(dqkv, want[0] * scale.view(batch, seq_len, 1)) < bound(dtype)
    assert error(dweight, want[1]) < 1e-6
    by_head = (want[0].double() * qkv.double()).unflatten(-1, (-1, e)).sum(-1)
    assert error(dots, by_head.flatten(0, 1).T) < bound(dtype)


def as_tiles(d_BTHE: Tensor) -> Tensor:
    """[B, H, T E]: 64 rows as four warps, in each two halves of eight rows; columns in pairs."""
    batch, seq_len, heads, e = d_BTHE.shape
    tiles = d_BTHE.view(batch, seq_len // 64, 4, 2, 8, heads, e // 8, 4, 2)
    #                   0      1              2  3  4  5      6       7  8
    return tiles.permute(0, 5, 1, 6, 2, 4, 7, 3, 8).reshape(batch, heads, -1)


@needs_gpu
@pytest.mark.gpu
def test_joint_attention_equals_its_parts_on_the_gpu() -> None:
    pytest.importorskip("flash_attn.cute", reason="needs the flash-attn-4 package")
    from matilda_model.flash4 import FlashAttention4, JointAttention4
    from matilda_model.layers import rope_table
    from matilda_model.triton_qkv import FusedQKVNormRope

    for e, seq_len in ((64, 256), (128, 384)):
        torch.manual_seed(0)
        batch, heads, kv = 2, 6, 2
        cos, sin = rope_table(seq_len, e, 1e4, torch.device("cuda"))
        qkv = torch.randn(batch, seq_len, (heads + 2 * kv) * e, device="cuda").bfloat16()
        leaves = [qkv, *(1 + 0.3 * torch.randn(2, e, device="cuda"))]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        arguments = (*leaves, cos, sin, heads, kv, 1e-6)
        dout = torch.randn(batch, seq_len, heads, e, device="cuda").bfloat16()
        joint = JointAttention4.apply(*arguments)
        apart = FlashAttention4.apply(*FusedQKVNormRope.apply(*arguments))
        assert torch.equal(joint, apart)
        for a, b in zip(
            torch.autograd.grad(joint, leaves, dout),
            torch.autograd.grad(apart, leaves, dout),
            strict=True,
        ):
            assert error(a, b) < bound(torch.bfloat16)  # the parts round in between
