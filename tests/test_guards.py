"""A step that is not finite never reaches the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from killable_runs import TrainServer, state_sha256
from matilda_train.metrics_log import read_rows
from matilda_train.run_comparison import untimed_rows


def test_nan_is_skipped_then_recovered(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, nan_at_steps=[4, 5]) == 0
    rows = {row["step"]: row for row in untimed_rows(run_dir) if "loss_nats" in row}
    clean = {row["step"]: row for row in untimed_rows(twin) if "loss_nats" in row}
    assert [step for step, row in rows.items() if row["skipped"]] == [4, 5]
    assert rows[4]["grad_norm"] is None
    assert [rows[step]["loss_nats"] for step in (1, 2, 3, 4)] == [
        clean[step]["loss_nats"] for step in (1, 2, 3, 4)
    ]
    # The data go on over skipped steps, and the weights did not move in them.
    assert rows[12]["batch_sha256"] == clean[12]["batch_sha256"]
    assert rows[6]["loss_nats"] != clean[6]["loss_nats"]
    assert state_sha256(run_dir) != state_sha256(twin)
    assert all(row["loss_nats"] is not None for row in rows.values())


def test_skips_are_bitwise_repeatable_over_a_kill(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert server.run(tiny_config, whole, corpus, nan_at_steps=[2, 3]) == 0
    assert server.run(tiny_config, killed, corpus, nan_at_steps=[2, 3], at_step=8) == -9
    assert server.run(tiny_config, killed, corpus) == 0
    assert state_sha256(killed) == state_sha256(whole)
    assert untimed_rows(killed) == untimed_rows(whole)


def test_too_many_skips_in_a_row_abort_with_exit_code_3(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    server.log.write_text("")
    code = server.run(tiny_config, run_dir, corpus, nan_at_steps=[5, 6, 7])
    assert code == 3, server.log.read_text()
    assert "3 steps in a row" in server.log.read_text()
    events = read_rows(run_dir / "events.jsonl")
    assert events[-1] | {"time": ""} == {"time": "", "event": "diverged", "step": 7}
    # No state with the bad steps in it was saved; the run resumes from the one before them.
    assert max(e["step"] for e in events if e["event"] == "save") <= 6
    assert server.run(tiny_config, run_dir, corpus) == 0


def test_skips_in_a_row_are_counted_over_a_restart(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    code = server.run(
        tiny_config, run_dir, corpus, nan_at_steps=[5], at_evaluation=2, signal="SIGTERM"
    )
    assert code == 75
    # Stopped at step 5 with one skip behind it: two more make three.
    assert server.run(tiny_config, run_dir, corpus, nan_at_steps=[1, 2]) == 3


def test_ranks_skip_alike_when_one_of_them_meets_a_nan(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    fault = {"rank": 1, "number": 4, "name": "blocks.1.mlp.down.weight"}
    assert server.run(tiny_config, run_dir, corpus, ranks=2, nan_in_backward=fault) == 0
    rows = [row for row in untimed_rows(run_dir) if "loss_nats" in row]
    assert [row["step"] for row in rows if row["skipped"]] == [4]
    assert rows[3]["loss_nats"] is not None
    assert rows[3]["grad_norm"] is None
    # Both ranks hold the same weights still: the same faultless run over one NaN, on one process.
    alone = tmp_path / "alone"
    assert server.run(tiny_config, alone, corpus, nan_at_steps=[4]) == 0
    one = [row for row in untimed_rows(alone) if "loss_nats" in row]
    assert [row["batch_sha256"] for row in rows] == [row["batch_sha256"] for row in one]
    for row, other in zip(rows[4:6], one[4:6], strict=True):
        assert abs(row["loss_nats"] - other["loss_nats"]) < 1e-5 * other["loss_nats"]


@pytest.mark.parametrize("step", [6, 12])
def test_state_that_is_not_finite_is_never_saved_nor_gone_on_with(
    step: int, server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    server.log.write_text("")
    code = server.run(tiny_config, run_dir, corpus, inf_in_weights_at_step=step)
    assert code == 3, server.log.read_text()
    assert "NaN or infinity and was not saved" in server.log.read_text()
    events = read_rows(run_dir / "events.jsonl")
    assert events[-1]["event"] == "diverged"
    assert all(row["step"] < step for row in events if row["event"] == "save")
    assert max(path.name for path in (run_dir / "checkpoints").glob("step-*")) < f"step-{step:08}"
    assert server.run(tiny_config, run_dir, corpus) == 0
    assert state_sha256(run_dir) == state_sha256(twin)
    assert untimed_rows(run_dir) == untimed_rows(twin)
