"""From a validated config to a model and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._functorch import config as functorch_config

from matilda_data import load_tokenizer
from matilda_model import KernelCheck, Transformer, self_check
from matilda_optim import Muon, param_groups
from matilda_train.config import OptimConfig, RunConfig

__all__ = [
    "build_model",
    "build_optimizer",
    "check_kernels",
    "compile_blocks",
    "compile_model",
    "token_byte_lengths",
]

SDPA_CONTEXT = (
    "torch.nn.attention._backend_from_string",
    "torch.nn.attention._sdpa_kernel",
)
"""Calls that `sdpa_kernel` leaves in a graph, which torch 2.11 to 2.15 do not list as cacheable.
What they do follows from their arguments, part of the cache's key, as is torch's version."""


def build_model(config: RunConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model with float32 weights drawn on the CPU from torch's generator, so that they
    are the same on every device, computing in `dtype`."""
    model = Transformer(config.model)
    model.compute_dtype = dtype
    return model.to(device)


def compile_model(model: Transformer) -> nn.Module:
    """`model` compiled for static shapes, sharing its parameters; `model` itself stays eager."""
    return cast(nn.Module, _compile(model))


def compile_blocks(model: Transformer) -> None:
    """Compile each block of `model` by itself, in place, for static shapes.

    With several ranks: a whole compiled backward hands over its gradients at its very end, a
    block's at the block's end, so that their exchange overlaps with what remains.
    """
    for block in model.blocks:
        block.forward = _compile(block.forward)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled such that torch caches its traced backward pass, too.

    Without it a start traces the whole model anew, some ten seconds for the hero, though every
    kernel is there. Torch is wary of two things a model uses: `autograd.Function`, whose forward
    and backward are part of the cache's key, and `SDPA_CONTEXT`.
    """
    functorch_config.autograd_cache_allow_custom_autograd_functions = True
    options: dict[str, Any] = {
        "unsafe_marked_cacheable_functions": dict.fromkeys(SDPA_CONTEXT, str(torch.__version__))
    }
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False, options=options)
    return compiled


def check_kernels(
    model: Transformer, windows: NDArray[np.uint16], device: torch.device, *, fall_back: bool
) -> list[KernelCheck]:
    """Compare the kernels that `model` will use with float32 arithmetic on these token windows.

    Raises `KernelMismatchError`; with `fall_back`, a kernel that `"auto"` chose is replaced by the
    plain one instead. Before sharding and compiling.
    """
    ids = torch.from_numpy(windows.astype(np.int64)).to(device)
    return self_check(model, ids[:, :-1], ids[:, 1:], fall_back=fall_back)


def build_optimizer(config: OptimConfig, model: Transformer, *, distribute: str = "none") -> Muon:
    """Muon and AdamW as one optimizer over every trainable parameter of `model`.

    A gradient that is not finite leaves its parameter and state bitwise as they were. `distribute`
    is Muon's: whether data-parallel ranks share out its matrices.
    """
    groups = param_groups(
        model,
        algorithm=config.algorithm,
        lr=config.lr,
        weight_decay=config.weight_decay,
        adamw_lr=config.adamw_lr,
        embedding_lr=config.embedding_lr,
        adamw_weight_decay=config.weight_decay
        if config.algorithm == "adamw"
        else config.adamw_weight_decay,
        betas=config.betas,
        eps=config.eps,
        momentum=config.momentum,
    )
    return Muon(
        groups,
        nonfinite="skip",
        backend=config.backend,
        distribute=distribute,
        graph=True,
    )


def token_byte_lengths(config: RunConfig) -> NDArray[np.int32]:
    """UTF-8 bytes of each token id, [vocab_size]; 0 for end-of-text and for padding ids."""
    lengths = load_tokenizer(config.data.tokenizer).token_byte_lengths
    return np.pad(lengths, (0, max(0, config.model.vocab_size - len(lengths))))
