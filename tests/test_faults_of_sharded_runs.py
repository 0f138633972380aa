"""Two ranks that share out the weights (FSDP2): rollback, autopsy and replay are those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from killable_runs import TrainServer, state_sha256
from matilda_train.metrics_log import read_rows
from matilda_train.replay import read_bundle, replay_step
from matilda_train.rollback import read_rollbacks
from matilda_train.run_comparison import untimed_rows

FSDP = "train.parallel=fsdp"
SPIKE = 11
NOISE: dict[str, Any] = {
    "ranks": 2,
    "poisoned_samples": [8 * (SPIKE - 1), 8 * SPIKE],
    "set": [
        FSDP,
        "train.total_steps=14",
        "train.spike_policy=rollback",
        "train.spike_warmup_steps=10",
        "train.spike_threshold=1.6",
        "train.rollback_margin_steps=1",
    ],
}


@pytest.fixture(scope="module")
def rolled_back(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run_dir = tmp_path_factory.mktemp("sharded") / "run"
    assert server.run(tiny_config, run_dir, corpus, **NOISE) == 0, server.log.read_text()
    return run_dir


def test_spike_rolls_both_ranks_back_and_its_bundle_replays_on_one_process(
    rolled_back: Path, corpus: Path
) -> None:
    events = [row["event"] for row in read_rows(rolled_back / "events.jsonl")]
    assert [e for e in events if e != "save"] == [
        *("start", "spike", "rollback", "rolled_back", "finish")
    ]
    [rollback] = read_rollbacks(rolled_back)
    assert (rollback.step, rollback.undone_from) == (SPIKE, SPIKE - 1)
    steps = [row["step"] for row in untimed_rows(rolled_back) if "loss_nats" in row]
    assert steps == list(range(1, 15))

    bundle = rolled_back / "autopsies" / f"step-{SPIKE:08d}-spike"
    report = read_bundle(bundle)
    assert report["weights"] == "before the update"
    assert report["rerun"]["loss_nats"] > report["rerun"]["median_loss_nats"]
    assert report["rerun"]["gradient_norm_ratio"]
    # A step that is part of the run now: the same batches, and losses but for the order of sums.
    replay = replay_step(rolled_back, 8, data_dir=corpus)
    assert replay.expected is not None
    assert replay.row["batch_sha256"] == replay.expected["batch_sha256"]
    assert replay.row["loss_nats"] == pytest.approx(replay.expected["loss_nats"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        {"at_event": {"name": "rollback", "after": False}, "only_rank": 0},
        {"at_event": {"name": "rollback", "after": True}, "only_rank": 0},
        {"at_phase": "restoring", "occurrence": 2, "signal": "SIGKILL"},
        {"at_step": 13, "only_rank": 1},
    ],
    ids=["before the decision", "after the decision", "while restoring", "after the rollback"],
)
def test_sharded_run_killed_around_a_rollback_ends_in_the_same_bits(
    fault: dict[str, Any],
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    rolled_back: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, **NOISE, **fault, first_only=True) == -9
    assert server.run(tiny_config, run_dir, corpus, **NOISE) == 0, server.log.read_text()
    assert len(read_rollbacks(run_dir)) == 1
    assert state_sha256(run_dir) == state_sha256(rolled_back)
    assert untimed_rows(run_dir) == untimed_rows(rolled_back)


def test_weights_that_overflow_are_found_as_on_one_process(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    """A learning rate beyond reason: the fault is in the weights, so it shows when run again."""
    wild = ["optim.lr=1e18", "optim.adamw_lr=1e18", "log.autopsies=1", "eval.every_steps=100"]
    reports = []
    for name, options in (("one", {"set": wild}), ("two", {"set": [*wild, FSDP], "ranks": 2})):
        assert server.run(tiny_config, tmp_path / name, corpus, **options) == 3
        [bundle] = (tmp_path / name / "autopsies").iterdir()
        reports.append(read_bundle(bundle))
    one, two = reports
    assert one["rerun"]["outcome"] == "not finite again"
    for field in ("step", "reason", "weights", "batch_sha256", "tokens_sha256"):
        assert two[field] == one[field], field
    for field in ("outcome", "sample", "first_module", "first_parameter"):
        assert two["rerun"][field] == one["rerun"][field], field
