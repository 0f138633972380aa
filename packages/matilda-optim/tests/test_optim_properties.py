"""Every property of `muon_properties.py`, on the CPU and on a GPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def _properties() -> Any:
    spec = importlib.util.spec_from_file_location(
        "muon_properties", Path(__file__).parent / "muon_properties.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


PROPERTIES = _properties().PROPERTIES
NEED_A_GPU = {"offsets_beyond_two_to_the_31", "a_graph_replays_a_moving_learning_rate"}
SLOW = {"runs_and_processes_agree"}  # a second process imports torch


@pytest.mark.parametrize(
    "measure",
    [
        pytest.param(f, id=f.__name__, marks=pytest.mark.slow if f.__name__ in SLOW else ())
        for f in PROPERTIES
        if f.__name__ not in NEED_A_GPU
    ],
)
def test_it_holds_on_a_cpu(measure: Callable[[str], Any]) -> None:
    figure = measure("cpu")
    assert figure.holds, figure


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")
@pytest.mark.parametrize("measure", [pytest.param(f, id=f.__name__) for f in PROPERTIES])
def test_it_holds_on_a_gpu(measure: Callable[[str], Any]) -> None:
    figure = measure("cuda")
    assert figure.holds, figure
