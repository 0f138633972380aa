"""What disks, clocks and people do to a run: it says so, keeps what is good, and goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from killable_runs import TrainServer, state_sha256
from matilda_data import open_dataset
from matilda_train.metrics_log import read_rows
from matilda_train.run_comparison import untimed_rows

ROOT = Path(__file__).resolve().parent.parent


def assert_goes_on_as_the_twin(
    server: TrainServer, config: Path, run_dir: Path, corpus: Path, twin: Path
) -> None:
    assert server.run(config, run_dir, corpus) == 0, server.log.read_text()
    assert state_sha256(run_dir) == state_sha256(twin)
    assert untimed_rows(run_dir) == untimed_rows(twin)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a small disk: {error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, *, leave_bytes: int) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(65536))
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - leave_bytes)


@pytest.mark.parametrize("leave_bytes", [0, 65536])
def test_disk_full_ends_the_run_with_4_and_room_lets_it_go_on(
    leave_bytes: int,
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    twin: Path,
    small_disk: Path,
) -> None:
    run_dir = small_disk / "run"
    assert server.run(tiny_config, run_dir, corpus, at_step=5, signal="SIGTERM") == 75
    fill(small_disk, leave_bytes=leave_bytes)
    kept = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    server.log.write_text("")
    assert server.run(tiny_config, run_dir, corpus) == 4
    [said] = [line for line in server.log.read_text().splitlines() if line.startswith("error:")]
    # Either no byte can be written, or it is found first that there is no room for a checkpoint.
    assert "No space left on device" in said or "MB free" in said
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")) == kept
    (small_disk / "filler").unlink()
    assert_goes_on_as_the_twin(server, tiny_config, run_dir, corpus, twin)


def test_model_that_no_memory_holds_ends_with_4_and_a_hint(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    server.log.write_text("")
    huge = {"set": [f"model.d_ff={2**45}"]}
    assert server.run(tiny_config, tmp_path / "run", corpus, **huge) == 4
    [said] = [line for line in server.log.read_text().splitlines() if line.startswith("error:")]
    assert "`train.micro_batch_size`" in said


def test_shard_that_is_damaged_while_training_is_in_no_checkpoint(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    data, run_dir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    shard = open_dataset(data).sources[0].shards[0].path
    pristine = shard.read_bytes()
    server.log.write_text("")
    fault = {"flip_at_step": 5, "shard": str(shard)}
    assert server.run(tiny_config, run_dir, data, **fault) == 2
    said = server.log.read_text()
    assert f"{shard.name}' is damaged in chunk 0" in said
    saved = [row["step"] for row in read_rows(run_dir / "events.jsonl") if row["event"] == "save"]
    assert saved == [3]  # the one at step 6 would have held what the damaged tokens taught
    assert server.run(tiny_config, run_dir, data) == 2  # and nothing goes on over it
    shard.write_bytes(pristine)
    assert_goes_on_as_the_twin(server, tiny_config, run_dir, data, twin)


@pytest.mark.parametrize(
    "torn", [b"", b"\xff\x00\n" + b"[" * 9999 + b"\n" + b"1" * 9999 + b'\n{"step": 8, "loss_na']
)
def test_metrics_cut_short_by_a_kill_end_as_if_nothing_had_been(
    torn: bytes,
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    twin: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, at_step=8) == -9
    for name in ("metrics.jsonl", "events.jsonl"):
        file = run_dir / name
        if not torn:
            os.truncate(file, file.stat().st_size - 7)
        else:
            file.write_bytes(file.read_bytes() + torn)
    assert_goes_on_as_the_twin(server, tiny_config, run_dir, corpus, twin)
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert read_rows(run_dir / "events.jsonl")[-1]["event"] == "finish"


def test_run_that_has_saved_never_begins_from_scratch_by_itself(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, at_step=8) == -9
    rows = (run_dir / "metrics.jsonl").read_bytes()
    (run_dir / "checkpoints").rename(tmp_path / "elsewhere")
    server.log.write_text("")
    assert server.run(tiny_config, run_dir, corpus) == 4
    assert "The run had a checkpoint of step" in server.log.read_text()
    assert (run_dir / "metrics.jsonl").read_bytes() == rows
    (tmp_path / "elsewhere").rename(run_dir / "checkpoints")
    shutil.copytree(run_dir, tmp_path / "backup", copy_function=os.link)
    logs = [tmp_path / "backup" / name for name in ("metrics.jsonl", "events.jsonl")]
    before = [log.read_bytes() for log in logs]
    assert_goes_on_as_the_twin(server, tiny_config, run_dir, corpus, twin)
    assert [log.read_bytes() for log in logs] == before  # a copy by hard links is one's own, too


def flip_last_bit(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (shutil.rmtree, "step 12 is gone"),
        (lambda checkpoint: (checkpoint / "COMMIT").unlink(), "`COMMIT` is missing; it is now"),
        (flip_last_bit, "`model.safetensors` has a damaged tensor"),
    ],
    ids=["gone", "unsealed", "flipped bit"],
)
def test_finished_run_without_its_last_checkpoint_makes_it_again(
    harm: Callable[[Path], None],
    said: str,
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    twin: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(twin, run_dir)
    harm(run_dir / "checkpoints/step-00000012")
    request = ["--config", str(tiny_config), "--data-dir", str(corpus), "--run-dir", str(run_dir)]
    done = server.run_program(ROOT / "apps/train.py", request, tmp_path)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert state_sha256(run_dir) == state_sha256(twin)
    assert untimed_rows(run_dir) == untimed_rows(twin)


def test_finished_run_whose_only_checkpoint_is_damaged_is_never_called_complete(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(twin, run_dir)
    *older, last = sorted((run_dir / "checkpoints").glob("step-*"))
    for checkpoint in older:
        shutil.rmtree(checkpoint)
    flip_last_bit(last)
    for said in ("has a damaged tensor", "only 1 damaged in `quarantine`"):
        server.log.write_text("")
        assert server.run(tiny_config, run_dir, corpus) == 4
        [line] = [line for line in server.log.read_text().splitlines() if "error:" in line]
        assert said in line


def test_calendar_clock_that_jumps_changes_nothing(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir, patience = tmp_path / "run", ["train.hang_seconds=60"]
    stop = {"at_step": 5, "signal": "SIGTERM"}
    assert server.run(tiny_config, run_dir, corpus, set=patience, clock_jumps=True, **stop) == 75
    assert server.run(tiny_config, run_dir, corpus, set=patience, clock_jumps=True) == 0
    assert state_sha256(run_dir) == state_sha256(twin)
    assert untimed_rows(run_dir) == untimed_rows(twin)
    days = {row["time"][:10] for row in read_rows(run_dir / "events.jsonl")}
    assert len(days) > 1  # it did jump
    for row in read_rows(run_dir / "metrics.jsonl"):
        timed = {k: v for k, v in row.items() if k.endswith(("_ms", "_seconds"))}
        assert all(0 <= value < 3600 for value in timed.values()), timed


def test_second_process_in_a_run_directory_is_refused_and_the_first_unharmed(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    server.log.write_text("")
    slow = {"slow_seconds": 0.03, "rival_after": str(run_dir / "metrics.jsonl")}
    assert server.run(tiny_config, run_dir, corpus, **slow) == 2
    [said] = [line for line in server.log.read_text().splitlines() if line.startswith("error:")]
    assert "Another process is training in" in said
    assert state_sha256(run_dir) == state_sha256(twin)
    assert untimed_rows(run_dir) == untimed_rows(twin)


def test_a_run_whose_words_cannot_be_written_is_saved_and_finished_all_the_same(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    app = {
        "program": str(ROOT / "apps" / "train.py"),
        "arguments": [
            *("--config", str(tiny_config), "--data-dir", str(corpus), "--run-dir", str(run_dir)),
        ],
        "cwd": str(tmp_path),
        "stdout": "/dev/full",  # writing to it fails, as on a full disk or to a `tee` that is gone
        "log": "/dev/full",
    }
    assert server.request({**app, "at_step": 5, "signal": "SIGTERM"}) == 75
    assert server.request(app) == 0
    assert state_sha256(run_dir) == state_sha256(twin)
    assert untimed_rows(run_dir) == untimed_rows(twin)
