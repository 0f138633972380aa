"""Equal bits for any number of ranks and any layout, with gloo on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "gloo_program.py"


@pytest.mark.parametrize(("case", "lines"), [("ddp", 3), ("fsdp", 4), ("reshard", 4)])
def test_any_number_of_ranks_gives_the_bits_of_one(case: str, lines: int) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), case],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    verdicts = done.stdout.split("\n")[:-1]
    assert len(verdicts) == lines, done.stderr[-3000:]
    assert all(verdict.endswith(" equal") for verdict in verdicts), verdicts
