"""Equal bits for any number of ranks and any layout, with gloo on the CPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "gloo_program.py"


@pytest.mark.skipif(
    importlib.util.find_spec("numpy") is None,
    reason="torch.distributed sends objects (its checkpoints do) through numpy, which is missing",
)
@pytest.mark.parametrize(
    "case",
    [
        "short",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("ddp", "fsdp", "reshard")),
    ],
)
def test_any_number_of_ranks_gives_the_bits_of_one(case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), case],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    verdicts = done.stdout.split("\n")[:-1]
    assert len(verdicts) == 4, done.stderr[-3000:]
    assert all(verdict.endswith(" equal") for verdict in verdicts), verdicts
