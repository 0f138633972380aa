"""What the machine offers to the `"auto"` choices; constants to the compiler."""

from __future__ import annotations

import functools
import getpass
import importlib.util
import os
from importlib import metadata
from pathlib import Path

import torch

_TILES_OF = "4.0.0b36"
"""flash-attn-4 promises nothing about how its gradients lie before its own last step."""


def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interprets_triton() -> bool:
    """Whether triton's interpreter runs its kernels, which it does on a CPU too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_hopper_triton() -> bool:
    """Whether the current CUDA device is a Hopper (or later) and triton can be imported."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] >= 9
        and importlib.util.find_spec("triton") is not None
    )


def has_flash4() -> bool:
    """Whether FlashAttention-4 (the `hopper` extra) can run on the current CUDA device."""
    return _is_hopper() and _can_import("flash_attn", "cute")


def has_flash4_tiles() -> bool:
    """The same, and its gradients can be had as its kernel leaves them: in the version tested."""
    try:
        return has_flash4() and metadata.version("flash-attn-4") == _TILES_OF
    except metadata.PackageNotFoundError:
        return False


def has_quack() -> bool:
    """Whether quack-kernels (the `hopper` extra) can run on the current CUDA device."""
    return _is_hopper() and _can_import("quack", "gemm_config")


def name_user() -> None:
    """Give a process whose user has no name one, as in a container started with another's number.

    quack and flash-attn-4 name their caches after the user and would fail.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"


def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@functools.cache  # a look through every folder that Python imports from
def _can_import(package: str, module: str) -> bool:
    # a parent is not imported here: other packages of these names exist, and are slow to import
    found = importlib.util.find_spec(package)
    folders = [] if found is None else found.submodule_search_locations or []
    return any(
        Path(folder, module).is_dir() or Path(folder, f"{module}.py").is_file()
        for folder in folders
    )


# What `torch.compiler.assume_constant_result` does, without the seconds that importing the
# compiler takes: a run that does not compile never needs it.
for _function in (
    has_triton,
    interprets_triton,
    has_hopper_triton,
    has_flash4,
    has_flash4_tiles,
    has_quack,
):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
