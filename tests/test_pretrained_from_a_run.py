"""`matilda_model.load_pretrained` reads what a run wrote, and sees when it was damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from matilda_ckpt import Checkpointer
from matilda_model import load_pretrained
from matilda_train import load_run_model


def test_the_model_of_a_run_is_that_of_its_checkpoint(twin: Path) -> None:
    expected = load_run_model(twin, device="cpu")[0].state_dict()
    newest = sorted((twin / "checkpoints").glob("step-*"))[-1]
    for place in (twin, newest):
        found = load_pretrained(place).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_that_fill_several_files_are_read_whole(twin: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(twin, tmp_path / "run"))
    model = load_pretrained(run_dir)
    model.embed.weight.data.add_(1.0)
    checkpoints = Checkpointer(run_dir / "checkpoints", shard_bytes=10_000)
    checkpoints.save(10**6, {"model": model.state_dict()})
    checkpoints.close()
    newest = run_dir / "checkpoints" / "step-01000000"
    assert len(list(newest.glob("model-*.safetensors"))) > 1
    found = load_pretrained(run_dir).state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_a_bit_that_changed_on_the_disk_is_seen(twin: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(twin, tmp_path / "run"))
    weights = sorted((run_dir / "checkpoints").glob("step-*"))[-1] / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    for place in (20, len(raw) - 1):  # in the header, and in a tensor
        raw[place] ^= 1
        weights.unlink()  # it may share its bytes with another checkpoint
        weights.write_bytes(raw)
        with pytest.raises(ValueError, match="is damaged"):
            load_pretrained(run_dir)
        raw[place] ^= 1
