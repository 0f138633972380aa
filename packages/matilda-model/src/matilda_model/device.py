"""What the machine offers to the `"auto"` choices; constants to the compiler."""

from __future__ import annotations

import importlib.util

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_hopper_triton() -> bool:
    """Whether the current CUDA device is a Hopper (or later) and triton can be imported."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] >= 9
        and importlib.util.find_spec("triton") is not None
    )
