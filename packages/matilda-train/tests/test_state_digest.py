"""The digest of a state changes with anything in it, and with nothing else."""

from __future__ import annotations

import pytest
import torch

from matilda_train.state_digest import digest


def state() -> dict[str, object]:
    weights = torch.arange(101, dtype=torch.float32)
    return {
        "model": {"w": weights, "b": torch.ones(3, dtype=torch.bfloat16)},
        "step": [1, {"a": 2}],
    }


def test_equal_states_have_equal_digests_however_their_tensors_lie() -> None:
    other = state()
    strided = torch.zeros(202)
    strided[::2] = torch.arange(101)
    other["model"]["w"] = strided[::2]  # type: ignore[index]
    assert digest(other) == digest(state())


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.index_copy(0, torch.tensor([7]), torch.tensor([7.000001])),
        lambda w: w.roll(2),  # whole words change places
        lambda w: w.roll(1),
        lambda w: w.flip(0),
        lambda w: w.view(1, -1),
        lambda w: w.view(torch.int32),
        lambda w: torch.cat([w, torch.zeros(1)]),
        lambda w: w.index_copy(0, torch.tensor([0]), torch.tensor([-0.0])),
    ],
)
def test_every_change_of_a_tensor_shows(change: object) -> None:
    other = state()
    model = other["model"]
    assert isinstance(model, dict)
    assert callable(change)
    model["w"] = change(model["w"])
    assert digest(other) != digest(state())


def test_names_and_plain_values_count_too() -> None:
    renamed, counted = state(), state()
    renamed["model"] = {"v": renamed["model"]["w"], "b": renamed["model"]["b"]}  # type: ignore[index]
    counted["step"] = [1, {"a": 3}]
    assert len({digest(each) for each in (state(), renamed, counted)}) == 3
