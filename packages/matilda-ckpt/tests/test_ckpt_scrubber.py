"""The scrubber finds rot in checkpoints that nobody is loading."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from matilda_ckpt import Checkpointer, Scrubber


def test_rot_is_found_in_the_background_and_nothing_is_moved(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": np.full(100, step)})
    path = tmp_path / "step-00000002" / "w.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = threading.Event()
    seen: list[str] = []

    def on_damage(name: str, why: str) -> None:
        seen.append(f"{name}: {why}")
        found.set()

    with Scrubber(tmp_path, every_s=0.01, on_damage=on_damage) as scrubber:
        assert found.wait(30)
    assert list(scrubber.damaged) == ["step-00000002"]
    assert "damaged tensor" in seen[0]
    assert len(seen) == 1
    assert path.exists()


def test_every_checkpoint_gets_its_turn(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": step})
    scrubber = Scrubber(tmp_path)
    turns = {scrubber.scrub_one() for _ in range(3)}
    assert turns == {"step-00000001", "step-00000002", "step-00000003"}
    assert Scrubber(tmp_path / "empty").scrub_one() is None
