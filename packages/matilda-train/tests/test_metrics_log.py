"""Metrics and events survive kills: rows past the restored step are set aside, torn lines too."""

from __future__ import annotations

import json
import queue
import threading
from pathlib import Path

import pytest

from matilda_train.metrics_log import EventLog, MetricsLog, is_evaluation, read_rows
from matilda_train.wandb_follower import follow_rows


def write_steps(path: Path, first: int, last: int, start: int) -> None:
    log = MetricsLog(path, step=start)
    for step in range(first, last + 1):
        log.write({"step": step, "loss_nats": 1.0 / step})
    log.close()


def test_reopening_at_a_step_sets_later_rows_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 7, start=-1)
    log = MetricsLog(path, step=4)
    assert log.discarded_rows == 3
    log.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    aside = read_rows(tmp_path / "metrics.discarded.jsonl")
    assert [row["step"] for row in aside] == [5, 6, 7]


def test_line_cut_short_by_a_kill_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3, start=-1)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    write_steps(path, 4, 5, start=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_last_row_that_lost_but_its_end_of_line_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    log = MetricsLog(path, step=2)
    log.write({"step": 3})
    log.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_evaluations_are_remembered_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, step=-1)
    assert log.evaluated_step == -1
    log.write({"step": 0, "val_loss_nats": 5.0})
    log.write({"step": 4, "val_loss_nats": 3.0})
    log.close()
    log = MetricsLog(path, step=3)
    assert log.evaluated_step == 0
    assert log.newest_evaluation == {"val_loss_nats": 5.0}
    log.close()


def test_scores_of_tasks_are_no_held_out_loss(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", step=-1)
    by_source = {"val_bits_per_byte_by_source": {"prose": 1.5}}
    log.write({"step": 4, "val_loss_nats": 3.0, **by_source})
    log.write({"step": 2, "task_scores": {"piqa": {"acc": 0.5}}})
    log.close()
    assert (log.evaluated_step, log.newest_evaluation) == (4, {"val_loss_nats": 3.0})
    assert [is_evaluation(row) for row in read_rows(tmp_path / "m.jsonl")] == [True, True]
    assert not is_evaluation({"step": 1, "loss_nats": 2.0})


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", step=-1)
    log.write({"step": 1, "loss_nats": float("nan"), "val": {"a": float("inf"), "b": 1.0}})
    log.close()
    expected = {"step": 1, "loss_nats": None, "val": {"a": None, "b": 1.0}}
    EventLog(tmp_path / "e.jsonl").write("skip", loss_nats=float("-inf"))
    # as other programs read it: `read_rows` would take NaN for null
    assert json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail) == expected
    event = json.loads((tmp_path / "e.jsonl").read_text(), parse_constant=pytest.fail)
    assert event["loss_nats"] is None


def test_process_that_is_not_main_reads_but_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3, start=-1)
    before = path.read_bytes()
    log = MetricsLog(path, step=1, enabled=False)
    log.write({"step": 2, "val_loss_nats": 1.0})
    log.close()
    assert path.read_bytes() == before
    assert log.evaluated_step == 2


def test_event_after_a_torn_line_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = EventLog(path)
    assert events.last("start") is None
    events.write("start", step=0)
    with path.open("a") as file:
        file.write('{"event": "sa')
    events.write("finish", step=9)
    assert [row["event"] for row in read_rows(path)] == ["start", "finish"]
    last = events.last("finish")
    assert last is not None
    assert last["step"] == 9


def test_rewinding_sets_rows_aside_and_who_follows_the_file_gets_the_new_ones(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, step=-1)
    ended, followed = threading.Event(), queue.Queue[int]()

    def follow() -> None:
        for row in follow_rows(path, ended):
            followed.put(row["step"])

    thread = threading.Thread(target=follow)
    thread.start()
    for step in (1, 2, 3):
        log.write({"step": step, "loss_nats": 1.0})
    assert [followed.get(timeout=60) for _ in range(3)] == [1, 2, 3]
    log.rewind(1)
    assert log.discarded_rows == 2
    log.write({"step": 2, "loss_nats": 2.0})
    assert [followed.get(timeout=60) for _ in range(2)] == [1, 2]
    ended.set()
    thread.join()
    log.close()
    assert [row["loss_nats"] for row in read_rows(path)] == [1.0, 2.0]
    assert [r["step"] for r in read_rows(tmp_path / "metrics.discarded.jsonl")] == [2, 3]
