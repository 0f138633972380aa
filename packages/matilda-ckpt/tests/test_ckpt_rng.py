"""Random number generators continue exactly where they were."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from matilda_ckpt import Checkpointer, RngState, capture_rng, restore_rng


def draw() -> tuple[object, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.standard_normal(),
        torch.rand(3).tolist(),
        torch.randn(()).item(),
    )


def test_all_generators_continue_after_a_trip_through_disk(tmp_path: Path) -> None:
    random.gauss(0, 1)
    np.random.standard_normal()
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"rng": RngState()})
    expected = [draw() for _ in range(3)]
    checkpoints.restore({"rng": RngState()})
    assert [draw() for _ in range(3)] == expected


def test_rng_is_restored_after_every_other_object(tmp_path: Path) -> None:
    class Noisy:
        def state_dict(self) -> dict[str, object]:
            return {}

        def load_state_dict(self, state: object) -> None:
            draw()

    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"rng": RngState(), "noisy": Noisy()})
    expected = draw()
    checkpoints.restore({"rng": RngState(), "noisy": Noisy()})
    assert draw() == expected


def test_captured_state_is_data_not_pickle() -> None:
    state = capture_rng()
    assert isinstance(state.pop("torch_cpu"), torch.Tensor)
    state.pop("torch_cuda", None)
    assert json.loads(json.dumps(state)) == state


def test_malformed_state_is_refused() -> None:
    with pytest.raises(ValueError, match="capture_rng"):
        restore_rng({"python": 3})


@pytest.mark.gpu
def test_cuda_generators_continue() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    torch.rand(2, device="cuda")
    state = capture_rng()
    expected = torch.rand(4, device="cuda").tolist()
    restore_rng(state)
    assert torch.rand(4, device="cuda").tolist() == expected


@pytest.mark.gpu
def test_the_current_devices_generator_fits_another_number_of_devices() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.rand(2, device=device)
    state = capture_rng("current")
    stored = state["torch_cuda"]
    assert isinstance(stored, list)
    assert len(stored) == 1
    expected = torch.rand(4, device=device).tolist()
    more = state | {"torch_cuda": stored * (torch.cuda.device_count() + 1)}
    with pytest.raises(ValueError, match="CUDA devices and this process sees"):
        restore_rng(more)
    for each in (state, more):
        restore_rng(each, "current")
        assert torch.rand(4, device=device).tolist() == expected
