"""Weights & Biases beside a run: one id over all restarts, and never a reason to stop or wait."""

from __future__ import annotations

import importlib.util
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from killable_runs import TrainServer, state_sha256
from matilda_train.metrics_log import read_rows

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="needs `matilda-train[wandb]`: wandb"
)
ON = ["log.wandb=true"]
SECONDS = 120.0


def history(run_dir: Path) -> dict[int, dict[str, Any]]:
    """What W&B would be sent, by step, from the files that it keeps offline."""
    from wandb.proto import wandb_internal_pb2

    steps: dict[int, dict[str, Any]] = {}
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in read_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                steps.setdefault(int(row["_step"]), {}).update(row)
    return steps


def read_records(data: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: LevelDB's log format after seven bytes of its own."""
    block, position, record = 32768, 7, b""
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            return
        position += 7 + length
        record += data[position - length : position]
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def await_followers(run_dir: Path) -> None:
    """Until no follower of the run is left; each holds the lock while it lives."""
    import fcntl

    deadline = time.monotonic() + SECONDS
    with (run_dir / "wandb" / "follower.lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, (run_dir / "wandb/follower.log").read_text()
                time.sleep(0.05)
            else:
                return


def assert_rows_were_kept(run_dir: Path) -> None:
    kept = history(run_dir)
    rows = read_rows(run_dir / "metrics.jsonl")
    assert set(kept) == {row["step"] for row in rows}
    for row in rows:
        for name in ("loss_nats", "lr_muon", "val_bits_per_byte"):
            if row.get(name) is not None:
                assert kept[row["step"]][name] == pytest.approx(row[name]), (row["step"], name)


@needs_wandb
def test_offline_run_keeps_its_id_and_every_row_over_a_kill(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    env = {"WANDB_MODE": "offline"}
    assert server.run(tiny_config, run_dir, corpus, set=ON, env=env, at_step=6) == -9
    await_followers(run_dir)
    assert server.run(tiny_config, run_dir, corpus, set=ON, env=env) == 0
    await_followers(run_dir)
    run_id = json.loads((run_dir / "run.json").read_text())["run_id"]
    folders = sorted(path.name for path in run_dir.glob("wandb/offline-run-*"))
    assert len(folders) == 2
    assert all(name.endswith(f"-{run_id}") for name in folders)
    assert_rows_were_kept(run_dir)
    assert state_sha256(run_dir) == state_sha256(twin)
    assert not (run_dir / "wandb" / "status.txt").exists()


@pytest.fixture
def refusing_port() -> Iterator[int]:
    """A port of this machine at which every connection is refused, for as long as the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@needs_wandb
def test_unreachable_server_neither_stops_nor_holds_up_a_run(
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    twin: Path,
    tmp_path: Path,
    refusing_port: int,
) -> None:
    run_dir = tmp_path / "run"
    env = {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": f"http://127.0.0.1:{refusing_port}",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_INIT_TIMEOUT": "2",
    }
    assert server.run(tiny_config, run_dir, corpus, set=ON, env=env) == 0
    assert state_sha256(run_dir) == state_sha256(twin)
    # The run is over; what is left to do beside it, is done without it.
    await_followers(run_dir)
    assert "could not be reached" in (run_dir / "wandb" / "status.txt").read_text()
    assert_rows_were_kept(run_dir)


def test_a_run_that_does_not_ask_for_wandb_never_imports_it(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    optional = ["wandb", "plotly", "matilda_train.wandb_follower", "matilda_train.report"]
    short = ["train.total_steps=2"]
    code = server.run(tiny_config, tmp_path / "run", corpus, set=short, unimportable=optional)
    assert code == 0, server.log.read_text()
    assert not (tmp_path / "run" / "wandb").exists()
