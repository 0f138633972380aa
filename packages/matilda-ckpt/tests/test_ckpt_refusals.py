"""What a checkpoint cannot hold, and mistaken arguments, are refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from matilda_ckpt import Checkpointer


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "empty"),
        ({"a b": 1}, "state name 'a b'"),
        ({"../x": 1}, "state name"),
        ({"Manifest": 1}, "state name"),
        ({"a": 1, "A": 2}, "differ only in case"),
        ({"x": {"y": object()}}, r"`x\.y` is a `builtins\.object`"),
        ({"x": {1, 2}}, "builtins.set"),
        ({"x": torch.ones(2, device="meta")}, "meta device"),
        ({"x": torch.ones(2, 2).to_sparse()}, "sparse"),
        ({"x": torch.ones(2, dtype=torch.complex128)}, "complex128"),
        ({"x": np.array(["a"])}, "dtype"),
        ({"x": np.ma.masked_array([1.0, 2.0], [0, 1])}, "`x` is a masked array"),  # type: ignore[no-untyped-call]
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, state: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path / "c").save(1, state)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": torch.nn.Linear(2, 2)}, "`state` must be a mapping of names.* not a `Linear`"),
        ({"metrics": {"loss": None}}, r"`metrics\['loss'\]` must be a number, not None"),
        ({"metrics": {"loss": torch.ones(2)}}, r"`metrics\['loss'\]` must be a number"),
        ({"metrics": [0.5]}, "`metrics` must be a mapping of names"),
        ({"nonfinite": "refused"}, "`nonfinite` must be 'mark' or 'refuse', not 'refused'"),
    ],
)
def test_a_mistaken_argument_of_save_is_named(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path / "c").save(1, **{"state": {"x": 1}, **arguments})
    assert not (tmp_path / "c").exists()


def test_restore_into_a_module_without_a_name_says_what_is_expected(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"model": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="`into` must be a mapping of names"):
        checkpoints.restore(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(tmp_path: Path, layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    for wait in (True, False):
        with pytest.raises(ValueError, match=r"`x\.y` is a nested tensor; store its values"):
            Checkpointer(tmp_path / "c").save(1, {"x": {"y": nested}}, wait=wait)


def test_cycles_are_refused(tmp_path: Path) -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="nested too deeply"):
        Checkpointer(tmp_path).save(1, {"x": loop})
