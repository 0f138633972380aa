"""Killed anywhere and run again, a run ends in the same bits as one that nobody disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from killable_runs import TrainServer, state_sha256
from matilda_train.metrics_log import read_rows
from matilda_train.run_comparison import untimed_rows


def finish(server: TrainServer, config: Path, run_dir: Path, corpus: Path) -> None:
    assert server.run(config, run_dir, corpus) == 0, server.log.read_text()


def assert_same_run(run_dir: Path, twin: Path) -> None:
    assert state_sha256(run_dir) == state_sha256(twin)
    assert untimed_rows(run_dir) == untimed_rows(twin)


def test_two_uninterrupted_runs_are_bitwise_equal(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    finish(server, tiny_config, tmp_path / "run", corpus)
    assert_same_run(tmp_path / "run", twin)


def test_every_checkpoint_names_its_run_config_and_data(twin: Path) -> None:
    run = json.loads((twin / "run.json").read_text())
    manifests = sorted((twin / "checkpoints").glob("step-*/MANIFEST.json"))
    assert len(manifests) >= 2
    for file in manifests:
        told = json.loads(file.read_text())["provenance"]
        assert told == {name: run[name] for name in ("run_id", "config_sha256", "data_id")}


def test_hash_of_the_state_sees_a_different_run(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    code = server.run(tiny_config, tmp_path / "run", corpus, set=["train.seed=7"])
    assert code == 0
    assert state_sha256(tmp_path / "run") != state_sha256(twin)


@pytest.mark.parametrize("step", [1, 4, 7, 12])
def test_resume_is_bitwise_after_sigkill_in_a_step(
    step: int, server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, at_step=step) == -9
    finish(server, tiny_config, run_dir, corpus)
    assert_same_run(run_dir, twin)


@pytest.mark.parametrize("at_fsync", [2, 3, 5, 7, 8, 9, 10, 11, 13, 17, 23, 29, 37])
def test_resume_is_bitwise_after_sigkill_mid_save(
    at_fsync: int, server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, at_fsync=at_fsync) == -9
    finish(server, tiny_config, run_dir, corpus)
    assert_same_run(run_dir, twin)


def test_resume_is_bitwise_after_a_kill_in_every_life(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    faults: list[dict[str, object]] = [
        {"at_fsync": 1},
        {"at_step": 2},
        {"at_step": 4, "signal": "SIGTERM"},
        {"at_fsync": 12},
        {"at_evaluation": 1, "signal": "SIGINT"},
        {"at_step": 3, "signal": "SIGINT"},
    ]
    for fault in faults:
        assert server.run(tiny_config, run_dir, corpus, **fault) in (-9, 75)
    finish(server, tiny_config, run_dir, corpus)
    assert_same_run(run_dir, twin)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("fault", [{"at_step": 5}, {"at_evaluation": 2}, {"at_fsync": 6}])
def test_signal_saves_and_exits_75_and_resume_is_bitwise(
    number: str,
    fault: dict[str, int],
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    twin: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, signal=number, **fault) == 75
    events = read_rows(run_dir / "events.jsonl")
    assert events[-1]["event"] == "preempted"
    assert any(e["event"] == "save" and e["step"] == events[-1]["step"] for e in events)
    finish(server, tiny_config, run_dir, corpus)
    assert_same_run(run_dir, twin)


def test_finished_run_is_left_alone(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in twin.rglob("*") if p.is_file()}
    assert server.run(tiny_config, twin, corpus) == 0
    after = {p: p.stat().st_mtime_ns for p in twin.rglob("*") if p.is_file()}
    assert before == after
