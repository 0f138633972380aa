"""A signal in any phase ends a real process with 75 and leaves what goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from killable_runs import TrainServer, state_sha256
from matilda_data import open_dataset
from matilda_train.metrics_log import read_rows
from matilda_train.phases import PHASES
from matilda_train.run_comparison import untimed_rows
from matilda_train.stop_signals import STOP_SIGNALS

ROOT = Path(__file__).resolve().parent.parent
NAMES = [number.name for number in STOP_SIGNALS]
CORPUS = ["data.corpus=python-stdlib"]


def start_app(name: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "apps" / f"{name}.py"), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def handles_signals(pid: int) -> bool:
    """Whether an app has come past its first line, as its kernel says: it handles SIGUSR1."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)
    return False


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("train", signal.SIGTERM),
        ("prepare_text", signal.SIGINT),
        ("prepare_smollm", signal.SIGUSR1),
        ("prepare_fineweb_edu", signal.SIGTERM),
    ],
)
def test_signal_during_imports_ends_the_app_with_75(
    name: str, number: signal.Signals, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    options: dict[str, list[object]] = {
        "train": ["--config", tiny_config, "--data-dir", corpus, "--run-dir", tmp_path / "out"],
        "prepare_text": ["--input", tiny_config, "--out-dir", tmp_path / "out"],
    }
    process = start_app(name, *options.get(name, ["--out-dir", tmp_path / "out"]))
    until(process, lambda: handles_signals(process.pid))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert said.strip() == f"{number.name}: stopped before anything began."
    assert not (tmp_path / "out").exists()


def test_signals_in_every_phase_of_one_run_leave_no_difference(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    code = server.run(
        tiny_config,
        tmp_path / "other",
        tmp_path / "new",
        set=[*CORPUS, f"data.dir={tmp_path / 'new'}"],
        at_phase="preparing data",
        signal="SIGTERM",
    )
    assert code == 75
    assert list((tmp_path / "new" / ".prepare").iterdir())
    assert not (tmp_path / "other").exists()

    run_dir = tmp_path / "run"
    lives = [phase for phase in PHASES if phase not in ("preparing data", "examining")]
    for life, phase in enumerate(lives):
        number = NAMES[life % len(NAMES)]
        code = server.run(tiny_config, run_dir, corpus, at_phase=phase, signal=number)
        # The last sample is a matter of seconds: it is finished, and with it the run.
        assert code == (0 if phase == "sampling" else 75), (phase, server.log.read_text())
        if phase != "starting":  # then there is no run yet
            events = read_rows(run_dir / "events.jsonl")
            assert events[-1]["event"] == ("finish" if phase == "sampling" else "preempted")
    assert state_sha256(run_dir) == state_sha256(twin)
    assert untimed_rows(run_dir) == untimed_rows(twin)


@pytest.mark.slow
@pytest.mark.parametrize("number", NAMES)
@pytest.mark.parametrize("occurrence", [1, 2])
@pytest.mark.parametrize("phase", PHASES[1:])
def test_every_signal_in_every_phase_leaves_no_difference(
    phase: str,
    occurrence: int,
    number: str,
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    twin: Path,
    tmp_path: Path,
) -> None:
    fault = {"at_phase": phase, "occurrence": occurrence, "signal": number}
    code = server.run(tiny_config, tmp_path / "run", corpus, **fault)
    # A phase that a run meets once (starting, restoring, warming up) does not come a second time.
    assert code in (0, 75)
    assert server.run(tiny_config, tmp_path / "run", corpus) == 0
    assert state_sha256(tmp_path / "run") == state_sha256(twin)
    assert untimed_rows(tmp_path / "run") == untimed_rows(twin)


@pytest.mark.slow
def test_signal_while_compiling_is_honoured(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    compiled = ["train.compile=true"]
    fault = {"at_phase": "warming up", "signal": "SIGUSR1"}
    assert server.run(tiny_config, tmp_path / "run", corpus, set=compiled, **fault) == 75
    assert server.run(tiny_config, tmp_path / "run", corpus, set=compiled) == 0


@pytest.mark.slow
def test_ranks_stop_together_when_one_is_signalled_during_imports(
    tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "apps" / "train.py"), "--config", str(tiny_config)]
    command += ["--data-dir", str(corpus), "--run-dir", str(tmp_path / "run")]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)})
        for rank in range(2)
    ]
    while not handles_signals(ranks[1].pid):
        assert ranks[1].poll() is None
        time.sleep(0.002)
    ranks[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=120) for process in ranks] == [75, 75]


def test_signal_while_preparing_text_leaves_work_that_goes_on(tmp_path: Path) -> None:
    for part in range(12):
        with (tmp_path / f"part-{part:02}.jsonl").open("w") as file:
            for i in range(400):
                file.write(json.dumps({"text": f"Document {part}.{i}. " * 40, "id": i}) + "\n")

    def prepare(out: Path) -> subprocess.Popen[str]:
        words = ["--input", tmp_path / "part-*.jsonl", "--tokenizer", "byte", "--out-dir", out]
        return start_app("prepare_text", *words)

    stopped = prepare(tmp_path / "out")
    journal = tmp_path / "out" / ".prepare" / "journal.jsonl"
    until(stopped, lambda: journal.exists() and journal.stat().st_size > 0)
    stopped.send_signal(signal.SIGUSR1)
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, said
    assert "run the same command again to go on" in said
    assert journal.stat().st_size > 0
    again, whole = prepare(tmp_path / "out"), prepare(tmp_path / "whole")
    for process in (again, whole):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert open_dataset(tmp_path / "out").data_id == open_dataset(tmp_path / "whole").data_id
