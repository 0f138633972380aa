"""Two processes train the run that one does: equal batches by hash, losses but for rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from killable_runs import TrainServer
from matilda_train.metrics_log import read_rows
from matilda_train.verify_resume import untimed_rows

ROOT = Path(__file__).resolve().parent.parent


def torchrun(processes: int, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), str(ROOT / "apps" / "train.py"), *args),
        ],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def rows_by_step(run_dir: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in untimed_rows(run_dir) if "loss_nats" in row}


def test_two_ranks_then_one_see_the_batches_and_losses_of_one(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ("--config", str(tiny_config), "--data-dir", str(corpus), "--run-dir", str(run_dir))
    done = torchrun(2, *arguments, "--set", "log.every_steps=1")
    assert done.returncode == 0, done.stderr
    one, two = rows_by_step(twin), rows_by_step(run_dir)
    assert one.keys() == two.keys()
    for step in one:
        assert two[step]["batch_sha256"] == one[step]["batch_sha256"]
        assert two[step]["loss_nats"] == pytest.approx(one[step]["loss_nats"], rel=2e-4)
    events = [row["event"] for row in read_rows(run_dir / "events.jsonl")]
    assert events == ["start", "save", "save", "save", "save", "finish"]


def test_world_size_may_change_at_resume(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, at_step=5, signal="SIGTERM") == 75
    arguments = ("--config", str(tiny_config), "--data-dir", str(corpus), "--run-dir", str(run_dir))
    done = torchrun(2, *arguments)
    assert done.returncode == 0, done.stderr
    one, two = rows_by_step(twin), rows_by_step(run_dir)
    assert [two[s]["batch_sha256"] for s in sorted(two)] == [
        one[s]["batch_sha256"] for s in sorted(one)
    ]
    assert two[12]["loss_nats"] == pytest.approx(one[12]["loss_nats"], rel=2e-4)
