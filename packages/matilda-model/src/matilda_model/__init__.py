"""Decoder-only transformers for small language models, in plain PyTorch.

Names load on first use: `ModelConfig` and the counts need no torch, whose import takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matilda_model.cache import KVCache
    from matilda_model.check import KernelCheck, self_check
    from matilda_model.config import ModelConfig
    from matilda_model.errors import KernelMismatchError
    from matilda_model.export import export_transformers
    from matilda_model.flops import count_matmul_params, count_params, flops_per_token
    from matilda_model.generation import (
        Choice,
        Sampling,
        generate,
        sample,
        stream_choices,
        stream_tokens,
    )
    from matilda_model.loss import LossOutput, linear_cross_entropy
    from matilda_model.model import Block, Transformer
    from matilda_model.pretrained import load_pretrained, save_pretrained

__all__ = [
    "Block",
    "Choice",
    "KVCache",
    "KernelCheck",
    "KernelMismatchError",
    "LossOutput",
    "ModelConfig",
    "Sampling",
    "Transformer",
    "count_matmul_params",
    "count_params",
    "export_transformers",
    "flops_per_token",
    "generate",
    "linear_cross_entropy",
    "load_pretrained",
    "sample",
    "save_pretrained",
    "self_check",
    "stream_choices",
    "stream_tokens",
]

_HOME = {
    "cache": ("KVCache",),
    "check": ("KernelCheck", "self_check"),
    "config": ("ModelConfig",),
    "errors": ("KernelMismatchError",),
    "export": ("export_transformers",),
    "flops": ("count_matmul_params", "count_params", "flops_per_token"),
    "generation": ("Choice", "Sampling", "generate", "sample", "stream_choices", "stream_tokens"),
    "loss": ("LossOutput", "linear_cross_entropy"),
    "model": ("Block", "Transformer"),
    "pretrained": ("load_pretrained", "save_pretrained"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
