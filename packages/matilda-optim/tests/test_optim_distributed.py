"""Equal bits for any number of ranks and any layout, with gloo on the CPU and NCCL on GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    _check(case, {})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", ["pair", "pair-reshard"])
def test_two_gpus_give_the_bits_of_one(case: str) -> None:
    _check(case, {"MATILDA_DEVICE": "cuda"})


def _check(case: str, extra: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), case],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, **extra},
    )
    lines = done.stdout.split("\n")[:-1]
    verdicts = lines[1:]
    assert verdicts, done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(verdict.endswith(" equal") for verdict in verdicts), verdicts
    if not extra:
        assert _here() == lines[0]


def _here() -> str:
    """The digest in this process, which shares nothing with those ranks."""
    spec = importlib.util.spec_from_file_location(
        "seeded_steps", PROGRAM.parent / "seeded_steps.py"
    )
    assert spec is not None
    assert spec.loader is not None
    steps = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: str = steps.alone()
    finally:
        torch.set_num_threads(threads)
    return found
