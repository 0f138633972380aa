"""A tiny training killed again and again ends where its uninterrupted twin does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = os.environ.get("MATILDA_SLOW") == "1"
KILLS = 500 if FULL else 3
MODES = [[], ["--background"]] if FULL else [["--background"]]


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_killed_training_ends_bitwise_equal(tmp_path: Path, mode: list[str]) -> None:
    command = [sys.executable, "-m", "matilda_ckpt.torture.soak", str(tmp_path / "c")]
    done = subprocess.run(
        [*command, "--kills", str(KILLS), *mode], capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["ok"], verdict
    assert verdict["kills"] >= min(KILLS, 3)
