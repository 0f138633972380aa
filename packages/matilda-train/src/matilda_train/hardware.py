"""Device and dtype choice, and the arithmetic peak that utilisation is measured against."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = [
    "choose_device",
    "choose_dtype",
    "device_name",
    "numerics",
    "peak_flops",
    "seed_generators",
]

# Dense bf16 tensor-core FLOP/s from the vendors' datasheets, by the exact name that torch reports.
PEAK_BF16_FLOPS: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


def choose_device(name: str, *, field: str = "train.device") -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:N`, which `field` or an option asks for.

    Raises `ValueError` when a GPU is asked for that torch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"`{field}` is {name!r}, but must be auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"`{field}` is {name!r}, but torch sees {torch.cuda.device_count()} CUDA device(s); "
            f"give `{field}{' ' if field.startswith('-') else '='}cpu` or mend the driver."
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Compute dtype: `auto` is bfloat16 on a GPU that has it and float32 elsewhere."""
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def device_name(device: torch.device) -> str:
    """The GPU's name as torch reports it, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak in FLOP/s of one device, or None for hardware that is not in the table."""
    if device.type != "cuda":
        return None
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device))


@contextmanager
def numerics(device: torch.device, *, deterministic: bool, threads: int | None) -> Iterator[None]:
    """Process-wide switches of torch: CPU threads, TF32 for what stays float32, determinism.

    They are put back at the end, so that the next run of the process has what its config says.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if deterministic:
            # cuBLAS reads this when its first handle is made; its default picks kernels by history.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.use_deterministic_algorithms(was_deterministic, warn_only=only_warned)


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (every device).

    Nothing here draws from them but weight initialisation; a model or hook of the user's may.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
