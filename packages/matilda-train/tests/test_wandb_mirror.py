"""The process that sends rows to Weights & Biases: what happens when it dies."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from matilda_train.config import LogConfig
from matilda_train.wandb_log import MOST_RESTARTS, WandbMirror, has_unsent_rows

STUB = """
import os, pathlib
from types import SimpleNamespace
SENT = pathlib.Path(os.environ["STUB_SENT"])
class Settings(dict):
    def __init__(self, **fields): super().__init__(fields)
class Run:
    settings = SimpleNamespace(_offline=True)
    step = 0
    def log(self, values, step):
        if len(SENT.read_text().split()) == int(os.environ["STUB_DIES_AT"]):
            SENT.write_text(SENT.read_text() + "x ")
            raise BrokenPipeError("the service is gone")
        SENT.write_text(SENT.read_text() + f"{step} ")
    def finish(self): pass
def init(**options): return Run()
def teardown(): pass
"""


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of six rows, and a wandb whose service dies at the fourth."""
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "wandb.py").write_text(STUB)
    monkeypatch.syspath_prepend(stub)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(stub), *filter(None, sys.path)]))
    monkeypatch.setenv("STUB_SENT", str(tmp_path / "sent"))
    monkeypatch.setenv("STUB_DIES_AT", "3")
    (tmp_path / "sent").write_text("")
    run = tmp_path / "run"
    run.mkdir()
    described = {"config": {}, "config_sha256": "0", "run_id": "ab12", "data_id": "cd"}
    (run / "run.json").write_text(json.dumps(described))
    rows = "".join(json.dumps({"step": step, "loss_nats": 3.0}) + "\n" for step in range(1, 7))
    (run / "metrics.jsonl").write_text(rows)
    return run


def wait_for(condition: object, *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_follower_that_died_is_started_again_and_sends_the_rest(
    run_dir: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    mirror = WandbMirror(LogConfig(wandb=True), run_dir, notes.append)

    def all_sent() -> bool:
        mirror.look()
        return not has_unsent_rows(run_dir)

    wait_for(all_sent)
    mirror.close()
    assert [note.split(" (")[0] for note in notes] == ["Weights & Biases' process has ended"]
    sent = (tmp_path / "sent").read_text().split()
    assert sent == ["1", "2", "3", "x", "3", "4", "5", "6"]  # W&B takes a row that it has again


def test_one_that_dies_every_time_is_given_up(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_SENT", str(run_dir / "no" / "such"))  # each row fails
    notes: list[str] = []
    mirror = WandbMirror(LogConfig(wandb=True), run_dir, notes.append)

    def given_up() -> bool:
        mirror.look()
        return len(notes) == MOST_RESTARTS and mirror._follower.poll() is not None

    wait_for(given_up)
    mirror.look()
    mirror.close()
    assert len(notes) == MOST_RESTARTS + 1
    assert "has failed" in notes[-1]
    assert has_unsent_rows(run_dir)
