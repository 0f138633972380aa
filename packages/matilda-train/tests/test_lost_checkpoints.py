"""What a resume says of checkpoints that it should have gone on from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from matilda_ckpt import Checkpointer, NoValidCheckpointError, Restored
from matilda_train.lost_checkpoints import describe_lost
from matilda_train.metrics_log import EventLog


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has saved steps 1 and 2."""
    events = EventLog(tmp_path / "events.jsonl")
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": np.full(9, step)})
            events.write("save", step=step)
    return tmp_path


def restored(run_dir: Path) -> Restored | None:
    with Checkpointer(run_dir / "checkpoints") as checkpoints:
        return checkpoints.restore({})


def test_a_resume_from_the_newest_save_has_nothing_to_tell(run_dir: Path) -> None:
    assert describe_lost(run_dir, restored(run_dir)) == []


def test_one_that_is_gone_is_named_with_the_steps_that_are_done_again(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "step-00000002")
    assert describe_lost(run_dir, restored(run_dir)) == [
        "the checkpoint of step 2 is gone: the steps after 1 are done again"
    ]


def test_one_that_is_damaged_is_told_once_and_with_its_new_place(run_dir: Path) -> None:
    file = run_dir / "checkpoints" / "step-00000002" / "x.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (said,) = describe_lost(run_dir, restored(run_dir))
    quarantine = run_dir / "checkpoints" / "quarantine"
    (moved,) = (path for path in quarantine.iterdir() if path.is_dir())
    assert said.endswith(f"; it is now {str(moved)!r}")


def test_what_a_rollback_undid_is_not_missed(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "step-00000002")
    EventLog(run_dir / "events.jsonl").write("rollback", step=2)
    assert describe_lost(run_dir, restored(run_dir)) == []


def test_a_run_that_has_saved_never_begins_from_scratch(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(NoValidCheckpointError, match="a checkpoint of step 2, as its"):
        describe_lost(run_dir, None)
    assert describe_lost(run_dir / "another", None) == []
