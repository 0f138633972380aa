"""A process that hangs says where and ends, for a launcher to restart it; a slow one goes on."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from killable_runs import TrainServer
from matilda_train.metrics_log import read_rows
from matilda_train.watchdog import EXIT_HUNG

FEW = ["train.total_steps=6", "eval.every_steps=1000"]


def patience(seconds: float) -> list[str]:
    return [*FEW, f"train.hang_seconds={seconds}"]


def test_rank_that_waits_for_a_stopped_one_names_it_and_the_phase(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    server.log.write_text("")
    fault = {"at_step": 4, "signal": "SIGSTOP", "only_rank": 1, "ranks": 2, "first_only": True}
    code = server.run(tiny_config, run_dir, corpus, set=patience(3), **fault)
    said = server.log.read_text()
    assert code == EXIT_HUNG, said
    # Rank 1 may be stopped before rank 0 has all of what step 3 exchanges.
    pattern = r"error: rank 0 hangs: no progress for . s while training, at step ([34]), "
    found = re.search(pattern, said)
    assert found, said
    step = int(found[1])
    assert "rank 1 is silent (stopped, dead or cut off)" in said
    [dump] = (run_dir / "hangs").glob(f"step-{step:08}-rank-0-*.txt")
    assert 'matilda_train/loop.py", line' in dump.read_text()
    event = read_rows(run_dir / "events.jsonl")[-1]
    assert (event["event"], event["phase"], event["step"]) == ("hang", "training", step)
    assert "rank 1 is silent" in event["peers"][0]
    # What a launcher does next: the newest checkpoint stands.
    assert server.run(tiny_config, run_dir, corpus, ranks=2, set=FEW) == 0


def test_reader_that_waits_for_its_disk_is_named(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    server.log.write_text("")
    fault = {"fifo": str(tmp_path / "fifo"), "fifo_at_read": 4}
    code = server.run(tiny_config, tmp_path / "run", corpus, set=patience(2), **fault)
    said = server.log.read_text()
    assert code == EXIT_HUNG, said
    assert "while training, at step 3, in `read` (batches.py" in said
    [dump] = (tmp_path / "run" / "hangs").iterdir()
    assert "in stalling" in dump.read_text()  # the reader's thread, which is the culprit


def test_data_set_that_cannot_be_opened_is_a_hang_while_starting(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    shard = next(data.glob("*train*.bin"))
    shard.unlink()
    os.mkfifo(f"{shard}.zst")
    server.log.write_text("")
    code = server.run(tiny_config, tmp_path / "run", data, set=patience(0.4))
    said = server.log.read_text()
    assert code == EXIT_HUNG, said
    assert "while starting, at step 0, in `ensure_expanded` (archive.py" in said
    assert not (tmp_path / "run").exists()


def test_slow_rank_is_waited_for(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    slow = {"slow_seconds": 0.3, "only_rank": 1, "ranks": 2}
    assert server.run(tiny_config, tmp_path / "run", corpus, set=patience(3), **slow) == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "step_ms" in row]
    assert len(rows) == 6
    assert min(row["step_ms"] for row in rows) > 250  # the waiting shows in the rows of rank 0


@pytest.mark.parametrize("seconds", [0, -1])
def test_patience_must_be_positive(
    seconds: int, server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    choice = [f"train.hang_seconds={seconds}"]
    assert server.run(tiny_config, tmp_path / "run", corpus, set=choice) == 2
