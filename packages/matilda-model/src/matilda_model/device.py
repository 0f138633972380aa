"""What the machine offers to the `"auto"` choices; constants to the compiler."""

from __future__ import annotations

import importlib.util

import torch


def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def has_hopper_triton() -> bool:
    """Whether the current CUDA device is a Hopper (or later) and triton can be imported."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] >= 9
        and importlib.util.find_spec("triton") is not None
    )


# What `torch.compiler.assume_constant_result` does, without the seconds that importing the
# compiler takes: a run that does not compile never needs it.
for _function in (has_triton, has_hopper_triton):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
