"""Start-up self-check: each chosen kernel against plain float32 arithmetic on the run's shapes.

A fused kernel that is wrong on one GPU, one compiler or one shape trains a worse model without an
error message. This compares values and gradients before the first step and names the kernel.

Shape suffixes: B batch, T sequence, D model, H query heads, K key/value heads, E head dim,
N tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matilda_model.attention import causal_attention, causal_mask, same_document
from matilda_model.errors import KernelMismatchError
from matilda_model.layers import ReLU2, branching_rms_norm
from matilda_model.loss import linear_cross_entropy
from matilda_model.model import Block, Transformer, row_squares

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Allowed error, `|got - expected| / |expected|`, by compute dtype: several times what correct
kernels show (docs/LOG.md), far under what a wrong mask, scale or missing term does."""

FP8_TOLERANCE = 0.1
"""The same for `loss="fused_fp8"`: e4m3 keeps 3 bits of a mantissa, e5m2 2."""


@dataclass(frozen=True)
class KernelCheck:
    """One compared quantity."""

    kernel: str
    """The config field that chose the kernel: `attention`, `norm`, `matmul` or `loss`."""
    quantity: str
    """What was compared: a value, or the gradient for an input or weight."""
    error: float
    """`|got - expected| / |expected|`; NaN when either is not finite."""
    tolerance: float
    raised: str | None = None
    """What the kernel raised instead of computing anything."""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        if self.raised is not None:
            return f"{self.quantity} could not be computed ({self.raised})"
        return f"{self.quantity} is off by {self.error:.2g}, allowed {self.tolerance:.2g}"


def self_check(
    model: Transformer,
    input_ids_BT: Tensor,
    targets_BT: Tensor,
    *,
    tolerance: float | None = None,
    fall_back: bool = False,
) -> list[KernelCheck]:
    """Compare the model's chosen kernels with float32 references; the rows, in order of the model.

    Uses the model's weights, its `compute_dtype`, the batch's ids and at most its first two rows,
    so that the check costs little beside a step: of the first block, whole and on weights of its
    own where its norms are folded, and of the attention of the first with and without a window.
    Leaves weights, gradients and torch's generators as they were. `tolerance` defaults to
    `TOLERANCE[compute_dtype]`.

    A mismatch, or a kernel that raises, is a `KernelMismatchError` naming the kernel; with
    `fall_back=True` a kernel that the config left to `"auto"` is replaced by the plain one instead
    (look at the rows that are not `ok`) and what then is used compared as well. Call it before
    compiling.
    """
    if tolerance is None and model.compute_dtype not in TOLERANCE:
        raise ValueError(f"no tolerance is known for {model.compute_dtype}: give `tolerance`")
    limit = TOLERANCE[model.compute_dtype] if tolerance is None else tolerance
    fp8 = tolerance is None and model.config.loss == "fused_fp8"
    ids, targets = input_ids_BT[:2], targets_BT[:2]
    blocks: list[Any] = list(model.blocks)
    # full and windowed layers have kernels of their own: a block of each
    of_each_window = {block.attn.window: block for block in reversed(blocks)}
    with torch.random.fork_rng(devices=_cuda_index(ids)), torch.no_grad():
        torch.manual_seed(0)
        seed_BTD = torch.randn(*ids.shape, model.config.d_model, device=ids.device)
        hidden_BTD = model.norm(
            torch.nn.functional.embedding(ids, model.embed.weight) + 0.5 * seed_BTD
        )
    x_BTD = hidden_BTD.to(model.compute_dtype, copy=True).requires_grad_()
    checks, apart = [], []
    for block in of_each_window.values():
        if block.folds(x_BTD):
            checks += _check_folded(model, block, hidden_BTD, limit)
        else:
            apart.append(block)
    if apart:
        checks += _check_norm(model, apart[0], hidden_BTD, limit)
        for block in apart:
            checks += _check_attention(model, block, hidden_BTD, ids, limit)
        checks += _check_matmul(model, apart[0], hidden_BTD, limit)
    checks += _check_loss(model, hidden_BTD, targets, FP8_TOLERANCE if fp8 else limit)
    bad = [check for check in checks if not check.ok]
    kernels = list(dict.fromkeys(check.kernel for check in bad))
    refused = [k for k in kernels if not (fall_back and getattr(model.config, k) == "auto")]
    if refused:
        worst = next(check for check in bad if check.kernel == refused[0])
        raise KernelMismatchError(
            f"the `{worst.kernel}` kernel {getattr(model.config, worst.kernel)!r} is wrong here: "
            f"{worst}; set `model.{worst.kernel}` to {_PLAIN[worst.kernel]!r}"
        )
    if kernels:
        model.choose_backends(**{kernel: _PLAIN[kernel] for kernel in kernels})
        checks += self_check(model, ids, targets, tolerance=tolerance, fall_back=fall_back)
    return checks


_PLAIN = {"attention": "math", "norm": "plain", "matmul": "plain", "loss": "chunked"}


def _cuda_index(x: Tensor) -> list[int]:
    return [x.device.index] if x.device.type == "cuda" and x.device.index is not None else []


def _compare(
    kernel: str,
    names: tuple[str, ...],
    got: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    leaves: tuple[Tensor, ...],
    dtypes: tuple[torch.dtype, ...],
    limit: float,
) -> list[KernelCheck]:
    """Rows for the value and for the gradient of each leaf, named `names`."""

    def run(function: Callable[..., Tensor], kinds: tuple[torch.dtype, ...]) -> list[Tensor]:
        inputs = [
            leaf.detach().to(kind).clone().requires_grad_()
            for leaf, kind in zip(leaves, kinds, strict=True)
        ]
        with torch.enable_grad():
            value = function(*inputs)
        # a fixed direction with no structure; cosine of the index needs no generator
        index = torch.arange(value.numel(), device=value.device, dtype=torch.float32)
        direction = torch.cos(index * 1.7).view(value.shape).to(value.dtype)
        return [value.detach(), *torch.autograd.grad(value, inputs, direction)]

    rounded = tuple(leaf.to(kind) for leaf, kind in zip(leaves, dtypes, strict=True))
    leaves = rounded  # both sides start from the same rounded inputs
    references = run(expected, (torch.float32,) * len(leaves))
    try:
        results = run(got, dtypes)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a foreign compiler raises, the kernel cannot be used
        raised = f"{type(error).__name__}: {error}".splitlines()[0]
        return [KernelCheck(kernel, "the value", math.nan, limit, raised)]
    labels = ("the value", *(f"the gradient of {name}" for name in names))
    return [
        KernelCheck(kernel, label, _error(a, b), limit)
        for label, a, b in zip(labels, results, references, strict=True)
    ]


def _error(got: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(got.double() - expected.double())
    value = float(difference / torch.linalg.vector_norm(expected.double()).clamp_min(1e-30))
    return value if math.isfinite(value) else math.nan


def _check_norm(
    model: Transformer, block: Block, hidden_BTD: Tensor, limit: float
) -> list[KernelCheck]:
    attn, dtype = block.attn, model.compute_dtype
    n_tokens = hidden_BTD.shape[1]
    cos, sin = model.cos[:n_tokens, None, :], model.sin[:n_tokens, None, :]
    rows = []
    for index, name in enumerate(("q", "k")):

        def run(x: Tensor, index: int = index) -> Tensor:
            return attn.heads(x, cos, sin)[index]

        def reference(x: Tensor, index: int = index) -> Tensor:
            return attn.heads(x, cos, sin, plain=True)[index]

        rows += _compare(
            "norm", (f"{name}'s input",), run, reference, (hidden_BTD,), (dtype,), limit
        )
    norm = block.attn_norm

    def branched(x: Tensor, weight: Tensor, backend: str = block.norm_backend) -> Tensor:
        normed, past = branching_rms_norm(x, weight, norm.eps, backend)
        return normed + 0.5 * past

    def plainly(x: Tensor, weight: Tensor) -> Tensor:
        return branched(x, weight, "plain")

    leaves, kinds = (hidden_BTD, norm.weight), (dtype, torch.float32)
    names = ("a block's input", "a norm's weight")
    return rows + _compare("norm", names, branched, plainly, leaves, kinds, limit)


def _check_folded(
    model: Transformer, block: Block, hidden_BTD: Tensor, limit: float
) -> list[KernelCheck]:
    """A whole block whose norms are parts of its products, beside one of plain parts.

    On weights drawn here: those of a new model hide an error behind the residual stream.
    """
    apart = copy.deepcopy(block)
    apart.norm_backend = apart.attn.norm = apart.attn.matmul = "plain"
    apart.attn.backend = "math"
    assert isinstance(apart.mlp, ReLU2)
    apart.mlp.matmul = "plain"
    n_tokens = hidden_BTD.shape[1]
    tables = model.cos[:n_tokens, None, :], model.sin[:n_tokens, None, :]
    ids = torch.empty(0, dtype=torch.int64, device=hidden_BTD.device)  # not looked at here
    names = (
        "attn_norm.weight", "attn.v.weight", "attn.o.weight",
        "mlp_norm.weight", "mlp.up.weight", "mlp.down.weight",
    )  # fmt: skip

    def run(chosen: Block, x: Tensor, *weights: Tensor, squares_N: Tensor | None) -> Tensor:
        inputs = (x, *tables, ids, None, squares_N)
        named = dict(zip(names, weights, strict=True))
        out: Tensor = torch.func.functional_call(chosen, named, inputs)[0]
        return out

    def folded(x: Tensor, *weights: Tensor) -> Tensor:
        return run(block, x, *weights, squares_N=row_squares(x))

    def plainly(x: Tensor, *weights: Tensor) -> Tensor:
        return run(apart, x, *weights, squares_N=None)

    source = torch.Generator(hidden_BTD.device).manual_seed(0)
    weights = []
    for name in names:
        shape = block.get_parameter(name).shape
        drawn = torch.randn(shape, generator=source, device=hidden_BTD.device)
        weights.append(1 + 0.1 * drawn if drawn.ndim == 1 else drawn / math.sqrt(shape[1]))
    leaves = (hidden_BTD, *weights)
    kinds = (model.compute_dtype, *(torch.float32 for _ in names))
    labels = ("a folded block's input", *(f"its {name}" for name in names))
    return _compare("norm", labels, folded, plainly, leaves, kinds, limit)


def _check_attention(
    model: Transformer, block: Block, hidden_BTD: Tensor, input_ids_BT: Tensor, limit: float
) -> list[KernelCheck]:
    attn = block.attn
    documents_BT = attn.documents(input_ids_BT)
    n_tokens = hidden_BTD.shape[1]
    cos, sin = model.cos[:n_tokens, None, :], model.sin[:n_tokens, None, :]
    with torch.no_grad():
        leaves = attn.heads(hidden_BTD, cos, sin, plain=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, attn.backend, attn.window, documents_BT)

    def reference(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        group = q_BTHE.shape[2] // k_BTKE.shape[2]
        k_BTHE, v_BTHE = (x.repeat_interleave(group, dim=2) for x in (k_BTKE, v_BTKE))
        scores = torch.einsum("bthe,bshe->bhts", q_BTHE, k_BTHE) / math.sqrt(q_BTHE.shape[-1])
        visible = causal_mask(n_tokens, attn.window, scores.device)
        if documents_BT is not None:
            visible = visible & same_document(documents_BT)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshe->bthe", weights, v_BTHE)

    kinds = (model.compute_dtype,) * 3
    if not attn.joins(hidden_BTD.to(model.compute_dtype)):
        return _compare("attention", ("q", "k", "v"), run, reference, leaves, kinds, limit)

    def jointly(x: Tensor) -> Tensor:
        return attn.attend_jointly(x, cos, sin)

    def apart(x: Tensor) -> Tensor:
        return reference(*attn.heads(x, cos, sin, plain=True))

    return _compare("attention", ("x",), jointly, apart, (hidden_BTD,), kinds[:1], limit)


def _check_matmul(
    model: Transformer, block: Block, hidden_BTD: Tensor, limit: float
) -> list[KernelCheck]:
    """The products that kernels of their own may compute: of q, k, v and output, and the MLP."""
    attn, mlp = block.attn, block.mlp
    kind = model.compute_dtype
    with torch.no_grad():
        joined_BTX = torch.nn.functional.linear(hidden_BTD, attn.q.weight.to(hidden_BTD.dtype))

    def joint(x: Tensor) -> Tensor:
        return x @ torch.cat((attn.q.weight, attn.k.weight, attn.v.weight)).T.to(x.dtype)

    def output(y: Tensor, residual: Tensor) -> Tensor:
        return residual + y @ attn.o.weight.T.to(y.dtype)

    rows = _compare("matmul", ("x",), attn.joint_product, joint, (hidden_BTD,), (kind,), limit)
    rows += _compare(
        "matmul", ("y", "the residual"), attn.output, output, (joined_BTX, hidden_BTD),
        (kind, kind), limit,
    )  # fmt: skip
    if not isinstance(mlp, ReLU2):
        return rows

    def relu2(x: Tensor, up: Tensor, down: Tensor, residual: Tensor) -> Tensor:
        return residual + torch.relu(x @ up.T).square() @ down.T

    leaves = (hidden_BTD, mlp.up.weight, mlp.down.weight, hidden_BTD.roll(1, 1))
    names = ("x", "up", "down", "the residual")
    return rows + _compare(
        "matmul", names, mlp.product, relu2, leaves, (kind,) * len(leaves), limit
    )


def _check_loss(
    model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor, limit: float
) -> list[KernelCheck]:
    weight_VD = model.embed.weight if model.head is None else model.head.weight
    config = model.config

    def run(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(h_ND: Tensor, w_VD: Tensor) -> Tensor:
            return linear_cross_entropy(
                h_ND,
                w_VD,
                targets_BT.flatten(),
                softcap=config.logit_softcap,
                z_loss=config.z_loss,
                backend=backend,
            ).loss

        return loss

    leaves = (hidden_BTD.flatten(0, 1), weight_VD)
    kinds = (model.compute_dtype, torch.float32)
    names = ("the hidden states", "the head")
    return _compare("loss", names, run(config.loss), run("plain"), leaves, kinds, limit)
