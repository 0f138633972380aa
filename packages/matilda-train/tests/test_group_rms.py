"""RMS of parameters and of their change, by optimizer group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from matilda_train.distributed import Ranks
from matilda_train.group_rms import GroupRms


def test_rms_is_that_of_the_values_and_of_their_change() -> None:
    torch.manual_seed(0)
    wide, narrow, other = (
        torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2, 2))
    )
    groups: list[dict[str, Any]] = [
        {"name": "hidden", "params": [wide, narrow]},
        {"params": [other]},
    ]
    watch = GroupRms(groups, 3, Ranks())
    for step in (1, 2, 3):
        before = torch.cat([wide.detach().flatten(), narrow.detach()])
        with watch.watch(step), torch.no_grad():
            wide += torch.randn_like(wide)
            narrow -= 0.01
            other *= 3
        found = watch.measure(step)
        if step < 3:
            assert found == {}
    after = torch.cat([wide.detach().flatten(), narrow.detach()])
    assert found.keys() == {"param_rms_hidden", "update_rms_hidden", "param_rms_1", "update_rms_1"}
    assert found["param_rms_hidden"] == pytest.approx(after.square().mean().sqrt().item())
    assert found["update_rms_hidden"] == pytest.approx(
        (after - before).square().mean().sqrt().item()
    )
    assert found["update_rms_1"] == pytest.approx(found["param_rms_1"] * 2 / 3)
    assert watch.measure(3) == {}


def test_a_row_of_another_step_does_not_tell_of_a_watched_one() -> None:
    watch = GroupRms([{"params": [torch.nn.Parameter(torch.ones(4))]}], 2, Ranks())
    with watch.watch(2):
        pass
    assert watch.measure(3) == {}


def test_a_step_that_was_refused_moves_nothing() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    watch = GroupRms([{"params": [p]}], 1, Ranks())
    with watch.watch(1):
        pass
    assert watch.measure(1) == {"param_rms_0": 1.0, "update_rms_0": 0.0}
