"""Crash images of a real ext4, replayed from a block log."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from matilda_ckpt.torture import powercut

FULL = os.environ.get("MATILDA_SLOW") == "1"


@pytest.fixture(autouse=True)
def _needs_devices() -> None:
    reason = powercut.why_not()
    if reason:
        pytest.skip(f"POWER-CUT REPLAY NOT RUN: {reason}")


def test_no_acknowledged_checkpoint_is_lost_and_none_is_torn(tmp_path: Path) -> None:
    verdict = powercut.run(
        tmp_path, "matilda-ckpt", images=1000 if FULL else 25, saves=12 if FULL else 4
    )
    assert verdict.violations == []
    assert verdict.images >= (1000 if FULL else 25)


class Careless:
    """Write, rename, no fsync: what most training scripts do."""

    def save(self, folder: Path, step: int) -> None:
        temp = folder / "tmp"
        temp.write_text(json.dumps({"step": step, "data": "x" * 20_000}))
        temp.rename(folder / f"step-{step}.json")

    def judge(self, folder: Path, acknowledged: int) -> tuple[bool, bool, str]:
        for step in range(acknowledged + 2, 0, -1):
            path = folder / f"step-{step}.json"
            try:
                whole = json.loads(path.read_text())["step"] == step
            except (OSError, ValueError, KeyError):
                continue
            if whole:
                return step >= acknowledged, True, f"{step} instead of {acknowledged}"
        return acknowledged == 0, True, "nothing loads"


def test_the_harness_convicts_a_writer_that_does_not_fsync(tmp_path: Path) -> None:
    verdict = powercut.run(tmp_path, "careless", Careless, images=4, saves=3)
    assert verdict.lost > 0
