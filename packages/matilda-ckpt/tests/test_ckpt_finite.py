"""Whether a state is finite is seen in every dtype that has something else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from matilda_ckpt import Checkpointer

WITH_INFINITY = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e5m2,
    torch.complex64,
]
SPOILT = [
    (dtype, value)
    for dtype in [*WITH_INFINITY, torch.float8_e4m3fn]
    for value in (math.inf, -math.inf, math.nan, -math.nan)
    if dtype in WITH_INFINITY or math.isnan(value)
]


@pytest.mark.parametrize(("dtype", "value"), SPOILT)
def test_one_bad_value_makes_a_checkpoint_unhealthy(
    dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    checkpoints = Checkpointer(tmp_path)
    for step, place in enumerate((0, -1), start=1):
        weight = torch.ones(1001).to(dtype)
        weight[place] = torch.tensor(value).to(dtype)
        assert not checkpoints.save(step, {"w": weight}).result().healthy


@pytest.mark.parametrize("dtype", [*WITH_INFINITY, torch.float8_e4m3fn])
def test_the_largest_and_smallest_values_of_a_dtype_are_finite(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    limits = torch.finfo(dtype)
    values = [limits.max, limits.min, limits.tiny, limits.tiny / 4, -0.0]
    weight = torch.tensor(values, dtype=torch.float64).to(dtype)
    assert Checkpointer(tmp_path).save(1, {"w": weight}).result().healthy


@pytest.mark.parametrize("code", ["<f8", "<f4", "<f2", "<c8"])
def test_arrays_are_looked_at_as_tensors_are(code: str, tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    array = np.ones(1001, dtype=code)
    assert checkpoints.save(1, {"w": array}).result().healthy
    array[-1] = np.inf
    assert not checkpoints.save(2, {"w": array}).result().healthy


def test_integers_of_the_same_bits_are_finite(tmp_path: Path) -> None:
    bits = torch.full((1001,), math.nan).view(torch.int32)
    assert Checkpointer(tmp_path).save(1, {"w": bits}).result().healthy
