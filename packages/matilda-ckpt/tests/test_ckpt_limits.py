"""What the reader would refuse is refused when it is saved, never acknowledged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matilda_ckpt import Checkpointer, SaveError, load_state
from matilda_ckpt.manifest import MAX_JSON_BYTES


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.name != "LOCK"}


@pytest.fixture
def one_save(tmp_path: Path) -> Checkpointer:
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"model": {"w": np.ones(3)}})
    return checkpoints


def test_json_larger_than_can_be_read_is_refused(one_save: Checkpointer) -> None:
    longest = "x" * (MAX_JSON_BYTES - len('"{"order":""}\n') + 1)
    one_save.save(2, {"sampler": {"order": longest}})
    assert one_save.load_state(2) == {"sampler": {"order": longest}}
    with pytest.raises(ValueError, match=r"state 'sampler' is 67\.1 MB of JSON.* as tensors or ar"):
        one_save.save(3, {"model": {"w": np.ones(3)}, "sampler": {"order": longest + "x"}})
    assert names(one_save.root) == {"step-00000001", "step-00000002"}
    assert one_save.restore({}) is not None


def test_provenance_nested_deeper_than_can_be_read_is_refused(one_save: Checkpointer) -> None:
    one_save.save(2, {"x": 1}, provenance=nested(198))
    for depth in (199, 250, 100_000):
        with pytest.raises(ValueError, match="`provenance` is not JSON"):
            one_save.save(3, {"x": 1}, provenance=nested(depth))
    restored = one_save.restore({})
    assert restored is not None
    assert restored.step == 2
    assert not restored.skipped


@pytest.mark.parametrize("where", ["directory", "objects"])
def test_what_only_shows_when_it_is_sealed_is_not_published(tmp_path: Path, where: str) -> None:
    """A description that grew too deep after it was handed over, as a thread's may."""
    if where == "objects":
        pytest.importorskip("fsspec", reason="object storage needs fsspec")
    root = tmp_path if where == "directory" else f"memory://{tmp_path.name}/limits"
    checkpoints = Checkpointer(root)
    checkpoints.save(1, {"x": 1})
    facts: dict[str, Any] = {"config": {}}

    class Late:
        def state_dict(self) -> dict[str, int]:
            facts["config"]["deep"] = nested(250)
            return {"n": 2}

    with pytest.raises(SaveError, match=r"step 2 was not saved .* nested more than 200 .* untouch"):
        checkpoints.save(2, {"late": Late()}, provenance=facts)
    assert [info.step for info in checkpoints.list()] == [1]
    if where == "directory":
        assert names(tmp_path) == {"step-00000001"}
    restored = checkpoints.restore({})
    assert restored is not None
    assert (restored.step, len(restored.skipped)) == (1, 0)


def test_run_id_must_fit_into_the_lock_file(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, run_id="\U0001f9ea" * 256) as longest:
        path = longest.save(1, {"x": 1}).path
    assert load_state(path) == {"x": 1}
    with pytest.raises(ValueError, match="`run_id` must be a string of at most 256 characters"):
        Checkpointer(tmp_path, run_id="r" * 257)
