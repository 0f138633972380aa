"""Several processes train the run that one does, however they share it and whoever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from killable_runs import TrainServer, state_sha256
from matilda_train.metrics_log import read_rows
from matilda_train.run_comparison import untimed_rows

ROOT = Path(__file__).resolve().parent.parent


def rows_by_step(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in untimed_rows(run_dir) if "loss_nats" in row}


def assert_same_batches_and_losses(run_dir: Path, twin: Path) -> None:
    """Equal batches; losses and gradients equal but for rounding, which training then amplifies.

    One process with another micro-batch size differs by 6e-7 up to step 6, 3e-4 up to step 12.
    """
    one, many = rows_by_step(twin), rows_by_step(run_dir)
    assert one.keys() == many.keys()
    for step in one:
        assert many[step]["batch_sha256"] == one[step]["batch_sha256"]
        rel = 5e-6 if step <= 6 else 2e-3
        assert many[step]["loss_nats"] == pytest.approx(one[step]["loss_nats"], rel=rel)
        assert many[step].keys() == one[step].keys()
        if step == 4:
            for name in ("param_rms_hidden", "update_rms_hidden", "update_rms_vector"):
                assert many[step][name] == pytest.approx(one[step][name], rel=1e-3)
        if step <= 6:
            assert many[step]["grad_norm"] == pytest.approx(one[step]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_see_the_batches_and_losses_of_one(
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    twin: Path,
    tmp_path: Path,
    parallel: str,
) -> None:
    run_dir = tmp_path / "run"
    choice = [f"train.parallel={parallel}", "optim.distribute=ddp"]
    assert server.run(tiny_config, run_dir, corpus, ranks=2, set=choice) == 0
    assert_same_batches_and_losses(run_dir, twin)
    events = [row["event"] for row in read_rows(run_dir / "events.jsonl")]
    assert events == ["start", "save", "save", "save", "save", "finish"]


def test_a_sharded_run_resumes_bit_for_bit(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    whole, pieces, choice = tmp_path / "whole", tmp_path / "pieces", ["train.parallel=fsdp"]
    assert server.run(tiny_config, whole, corpus, ranks=2, set=choice) == 0
    stop: dict[str, Any] = {"at_step": 5, "signal": "SIGTERM"}
    assert server.run(tiny_config, pieces, corpus, ranks=2, set=choice, **stop) == 75
    assert server.run(tiny_config, pieces, corpus, ranks=2, set=choice) == 0
    assert state_sha256(pieces) == state_sha256(whole)
    assert untimed_rows(pieces) == untimed_rows(whole)


def test_ranks_and_strategy_may_change_at_every_resume(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    fsdp, small = ["train.parallel=fsdp"], ["train.micro_batch_size=2"]
    stop: dict[str, Any] = {"at_step": 3, "signal": "SIGTERM"}
    assert server.run(tiny_config, run_dir, corpus, ranks=4, set=fsdp + small, **stop) == 75
    assert server.run(tiny_config, run_dir, corpus, ranks=2, set=fsdp, **stop) == 75
    assert server.run(tiny_config, run_dir, corpus, **stop) == 75
    assert server.run(tiny_config, run_dir, corpus, ranks=2) == 0
    assert_same_batches_and_losses(run_dir, twin)
    changed = [r["changed"] for r in read_rows(run_dir / "events.jsonl") if r["event"] == "resume"]
    assert [each.get("world_size") for each in changed] == ["4 → 2", "4 → 1", "4 → 2"]
    sizes = {"train.micro_batch_size": "2 → 4"}
    assert all(each.items() >= sizes.items() for each in changed)
    assert [("train.parallel" in each) for each in changed] == [False, True, True]


def test_ranks_that_would_train_different_runs_are_refused(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    """As on two machines that share no file system."""
    one, other = tmp_path / "one", tmp_path / "other"
    for run_dir, newest in ((one, 9), (other, 6)):
        shutil.copytree(twin, run_dir)
        for folder in run_dir.glob("checkpoints/step-*"):
            if int(folder.name[5:]) > newest:
                shutil.rmtree(folder)
        events = read_rows(run_dir / "events.jsonl")
        kept = [json.dumps(row) + "\n" for row in events if row["event"] != "finish"]
        (run_dir / "events.jsonl").write_text("".join(kept))
    server.log.write_text("")
    at_6 = {"run_dir": str(other)}
    assert server.run(tiny_config, one, corpus, ranks=2, rank_1=at_6) == 2
    assert "`step` is 6 on rank 1, but 9 on rank 0" in server.log.read_text()
    longer = {"set": ["train.total_steps=13"]}
    assert server.run(tiny_config, tmp_path / "new", corpus, ranks=2, rank_1=longer) == 2
    assert "`train.total_steps` is 13 on rank 1, but 12 on rank 0" in server.log.read_text()
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_torchrun_goes_on_by_itself_when_a_rank_is_killed(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    longer = ["train.total_steps=150", "ckpt.every_steps=10", "eval.every_steps=1000"]
    assert server.run(tiny_config, tmp_path / "twin", corpus, set=longer) == 0
    run_dir = tmp_path / "run"
    agent = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "--max-restarts", "1", str(ROOT / "apps" / "train.py")),
            *("--config", str(tiny_config), "--data-dir", str(corpus), "--run-dir", str(run_dir)),
            *("--set", *longer),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    while not list(run_dir.glob("checkpoints/step-*")):
        assert agent.poll() is None, agent.communicate()[1]
        time.sleep(0.01)
    os.kill(process_of_rank(1, agent.pid), signal.SIGKILL)
    _, said = agent.communicate(timeout=250)
    assert agent.returncode == 0, said
    events = [row["event"] for row in read_rows(run_dir / "events.jsonl")]
    assert [e for e in events if e not in ("save", "spike")] == ["start", "resume", "finish"]
    one, two = rows_by_step(tmp_path / "twin"), rows_by_step(run_dir)
    assert [two[s]["batch_sha256"] for s in two] == [one[s]["batch_sha256"] for s in one]


@pytest.mark.slow
def test_two_nodes_go_on_when_one_is_killed_and_comes_back(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    longer = ["train.total_steps=200", "ckpt.every_steps=10", "eval.every_steps=1000"]
    assert server.run(tiny_config, tmp_path / "twin", corpus, set=longer) == 0
    run_dir = tmp_path / "run"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def node(number: int) -> subprocess.Popen[bytes]:
        with (tmp_path / f"node-{number}.log").open("ab") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                    *("--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"),
                    *("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "proof"),
                    *("--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", "127.0.0.1"),
                    *(str(ROOT / "apps" / "train.py"), "--config", str(tiny_config)),
                    *("--data-dir", str(corpus), "--run-dir", str(run_dir), "--set", *longer),
                ],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=os.environ
                | {
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo",
                    # Else a node that comes back waits for an address that others have long had.
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                },
            )

    nodes = [node(0), node(1)]
    while not list(run_dir.glob("checkpoints/step-*")):
        assert all(agent.poll() is None for agent in nodes), said(tmp_path)
        time.sleep(0.01)
    workers = [pid for rank in range(2) if (pid := process_of(rank, nodes[1].pid)) is not None]
    for pid in (nodes[1].pid, *workers):
        os.kill(pid, signal.SIGKILL)
    nodes[1].wait()
    nodes[1] = node(1)
    assert [agent.wait(timeout=250) for agent in nodes] == [0, 0], said(tmp_path)
    events = [row["event"] for row in read_rows(run_dir / "events.jsonl")]
    assert [e for e in events if e not in ("save", "spike")] == ["start", "resume", "finish"]
    one, two = rows_by_step(tmp_path / "twin"), rows_by_step(run_dir)
    assert [two[s]["batch_sha256"] for s in two] == [one[s]["batch_sha256"] for s in one]


def said(folder: Path) -> str:
    return "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("node-*.log")))


def process_of_rank(rank: int, agent: int) -> int:
    """Process id of the worker that an agent started as `rank`."""
    found = process_of(rank, agent)
    assert found is not None, f"no worker of rank {rank} under process {agent}"
    return found


def process_of(rank: int, agent: int) -> int | None:
    """The same, or None when it has none."""
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == agent and f"RANK={rank}".encode() in (
                (entry / "environ").read_bytes().split(b"\0")
            ):
                return int(entry.name)
        except (OSError, IndexError, ValueError):
            continue
    return None
