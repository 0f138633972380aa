"""A run that ramps everything is still a function of its step: killed anywhere, on any ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from killable_runs import TrainServer, state_sha256
from matilda_optim import Muon
from matilda_train.metrics_log import read_rows
from matilda_train.run_comparison import untimed_rows

RAMPED = [
    'train.batch_ramp=["3 steps: 512", "2048 tokens: 1024"]',
    'train.seq_len_ramp=["0 steps: 8", "2 steps: 16", "1536 tokens: 32"]',
    "optim.schedule_by=tokens",
    "optim.weight_decay=0.1",
    "optim.weight_decay_schedule=linear",
    "optim.momentum_warmup_steps=4",
    "optim.momentum_cooldown_steps=3",
    "train.total_steps=9",
    "eval.every=1.5k tokens",
    "ckpt.every=1100 tokens",
]


@pytest.fixture(scope="module")
def ramped(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run_dir = tmp_path_factory.mktemp("ramped") / "run"
    assert server.run(tiny_config, run_dir, corpus, set=RAMPED) == 0, server.log.read_text()
    return run_dir


def test_tokens_batches_and_sequences_are_those_of_the_ramp(ramped: Path) -> None:
    rows = [row for row in read_rows(ramped / "metrics.jsonl") if "loss_nats" in row]
    assert [row["batch_tokens"] for row in rows] == [256] * 3 + [512] * 3 + [1024] * 3
    assert [row["seq_len"] for row in rows] == [8, 8, 16, 16, 16, 32, 32, 32, 32]
    assert [row["tokens"] for row in rows] == [
        256, 512, 768, 1280, 1792, 2304, 3328, 4352, 5376,
    ]  # fmt: skip
    evaluated = [r["step"] for r in read_rows(ramped / "metrics.jsonl") if "val_loss_nats" in r]
    saved = [r["step"] for r in read_rows(ramped / "events.jsonl") if r["event"] == "save"]
    assert evaluated == [0, 5, 7, 9]
    assert saved == [4, 6, 7, 9]


@pytest.mark.parametrize("step", [2, 3, 5, 6])
def test_resume_is_bitwise_before_and_after_every_boundary(
    step: int, server: TrainServer, tiny_config: Path, corpus: Path, ramped: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    stop = {"at_step": step, "signal": "SIGTERM"}
    assert server.run(tiny_config, run_dir, corpus, set=RAMPED, **stop) == 75
    assert server.run(tiny_config, run_dir, corpus, set=RAMPED) == 0
    assert state_sha256(run_dir) == state_sha256(ramped)
    assert untimed_rows(run_dir) == untimed_rows(ramped)


def test_ranks_may_change_in_the_middle_of_the_ramps(
    server: TrainServer, tiny_config: Path, corpus: Path, ramped: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    choice = [*RAMPED, "train.micro_batch_size=2"]
    stop = {"at_step": 4, "signal": "SIGTERM"}
    assert server.run(tiny_config, run_dir, corpus, set=choice, ranks=2, **stop) == 75
    assert server.run(tiny_config, run_dir, corpus, set=RAMPED) == 0
    one = [row for row in untimed_rows(ramped) if "loss_nats" in row]
    many = [row for row in untimed_rows(run_dir) if "loss_nats" in row]
    assert [row["batch_sha256"] for row in many] == [row["batch_sha256"] for row in one]
    for row, other in zip(many, one, strict=True):
        assert row["loss_nats"] == pytest.approx(other["loss_nats"], rel=1e-4)


def test_the_clock_decides_when_to_save_and_never_what_is_learned(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    clock = ["ckpt.every=0.01 s", "eval.every=0.02 s", "log.every=0.001 s"]
    assert server.run(tiny_config, run_dir, corpus, set=clock, ranks=1) == 0
    assert state_sha256(run_dir) == state_sha256(twin)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is compiled")
def test_resume_is_bitwise_on_a_gpu_with_compiled_ramps(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    choice = [*RAMPED, "train.device=cuda", "train.compile=true", "train.deterministic=true"]
    assert server.run(tiny_config, tmp_path / "whole", corpus, set=choice) == 0
    stop = {"at_step": 4, "signal": "SIGTERM"}
    assert server.run(tiny_config, tmp_path / "pieces", corpus, set=choice, **stop) == 75
    assert server.run(tiny_config, tmp_path / "pieces", corpus, set=choice) == 0
    assert state_sha256(tmp_path / "pieces") == state_sha256(tmp_path / "whole")
    assert untimed_rows(tmp_path / "pieces") == untimed_rows(tmp_path / "whole")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: no kernels, no graph")
def test_a_replayed_graph_follows_momentum_and_weight_decay() -> None:
    """Muon's kernels replay a graph from the third step on; what is scheduled must reach it."""
    torch.manual_seed(0)
    start = torch.randn(64, 128, device="cuda")
    weights = {}
    for backend in ("reference", "auto"):
        weight = torch.nn.Parameter(start.clone())
        optimizer = Muon([weight], backend=backend, graph=True, ns_dtype="float32")
        generator = torch.Generator(device="cuda").manual_seed(1)
        for step in range(8):
            group = optimizer.param_groups[0]
            group["lr"], group["momentum"] = 0.05 / (step + 1), 0.8 + 0.02 * step
            group["weight_decay"] = 0.5 / (step + 1)
            weight.grad = torch.randn(weight.shape, device="cuda", generator=generator)
            optimizer.step()
        weights[backend] = weight.detach().clone()
    difference = (weights["auto"] - weights["reference"]).norm() / weights["reference"].norm()
    assert difference < 1e-2


def test_a_run_of_a_version_without_these_fields_goes_on(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, at_step=5, signal="SIGTERM") == 75
    description = json.loads((run_dir / "run.json").read_text())
    for section, field in (("optim", "schedule_by"), ("train", "batch_ramp"), ("eval", "every")):
        del description["config"][section][field]
    (run_dir / "run.json").write_text(json.dumps(description))
    assert server.run(tiny_config, run_dir, corpus) == 0
    assert state_sha256(run_dir) == state_sha256(twin)
