"""The account of time of real runs, killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from killable_runs import TrainServer
from matilda_train.metrics_log import MACHINE_FIELDS, read_rows
from matilda_train.time_account import account_time


def test_account_of_a_killed_run_adds_up_and_equals_what_its_rows_said(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, at_step=6) == -9
    assert server.run(tiny_config, run_dir, corpus, at_step=4, signal="SIGTERM") == 75
    assert server.run(tiny_config, run_dir, corpus) == 0
    events = read_rows(run_dir / "events.jsonl")
    rows = read_rows(run_dir / "metrics.jsonl")
    lost = read_rows(run_dir / "metrics.discarded.jsonl")

    account = account_time(events, rows)
    assert account.restarts == 2
    assert sum(account.seconds.values()) == pytest.approx(account.wall_seconds)
    steps = [row for row in rows if "loss_nats" in row]
    assert [row["restarts"] for row in steps] == sorted(row["restarts"] for row in steps)
    # The steps that were killed are lost, those that a later life made again are not.
    assert account.seconds["redone"] == pytest.approx(
        sum(row.get("train_seconds", 0) + row.get("eval_seconds", 0) for row in lost), abs=1e-2
    )
    assert lost
    assert account.seconds["productive"] + account.seconds["warming up"] == pytest.approx(
        sum(row["train_seconds"] for row in steps)
    )
    for bucket in ("starting", "restoring", "evaluating", "saving", "between lives"):
        assert account.seconds[bucket] > 0, account.table()

    # What a row said then is what the files say of that moment now.
    last = steps[-1]
    resumes = [i for i, event in enumerate(events) if event["event"] == "resume"]
    then = account_time(events[: resumes[-1] + 1], rows[: rows.index(last) + 1])
    assert then.fraction == pytest.approx(last["goodput"], rel=1e-2)
    named = {name for row in rows for name in row}
    of_gpus = ("gpu_", "peak_memory", "throttling")
    on_cpu = {name for name in MACHINE_FIELDS if not name.startswith(of_gpus)}
    assert on_cpu <= named
