"""Preparation killed anywhere ends, after reruns, with the bytes of an undisturbed one."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

import matilda_data.inputs as inputs_module
import matilda_data.worker as worker_module
from matilda_data import prepare_text, verify

SLOW = os.environ.get("MATILDA_SLOW") == "1"

UNIT_BYTES = 3000  # about twenty units of the corpus
SCRIPT = f"""
import sys
import matilda_data.inputs as inputs
from matilda_data import prepare_text
inputs.UNIT_BYTES = {UNIT_BYTES}
prepare_text(sys.argv[1], sys.argv[2], tokenizer="byte", shard_tokens=4000, val_fraction=0.2,
             workers=int(sys.argv[3]))
"""


def prepare(corpus: Path, out: Path, workers: int = 1) -> None:
    prepare_text(
        corpus, out, tokenizer="byte", shard_tokens=4000, val_fraction=0.2, workers=workers
    )


def contents(data_dir: Path) -> dict[str, str]:
    return {
        path.relative_to(data_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in data_dir.rglob("*")
        if path.is_file()
    }


def fork_and_die_at(step: int, corpus: Path, out: Path) -> bool:
    """Prepare in a child that dies, without any clean-up, before its `step`-th file operation.

    Returns whether it got that far; a child that finishes instead exits cleanly.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (0, 77)
        return os.waitstatus_to_exitcode(status) == 77
    try:
        count = 0
        watched = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

        def hook(event: str, _: tuple[object, ...]) -> None:
            nonlocal count
            if event in watched or event == "matilda.fsync":
                count += 1
                if count == step:
                    os._exit(77)

        fsync = os.fsync

        def watched_fsync(descriptor: int) -> None:
            sys.audit("matilda.fsync")
            fsync(descriptor)

        os.fsync = watched_fsync
        sys.addaudithook(hook)
        prepare(corpus, out)
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_before_each_file_operation_in_turn(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", 12_000)
    prepare(corpus, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    # Each child starts where the one before died: progress is kept, and the end is the same.
    deaths = 0
    for step in [*range(1, 60, 1 if SLOW else 3), *range(60, 2000, 7 if SLOW else 13)]:
        if not fork_and_die_at(step, corpus, tmp_path / "out"):
            break
        deaths += 1
    assert deaths > 20
    prepare(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == expected
    # And each child from nothing, then one rerun.
    for step in range(1, 2000, 1 if SLOW else 47):
        out = tmp_path / f"from-nothing-{step}"
        died = fork_and_die_at(step, corpus, out)
        prepare(corpus, out)
        assert contents(out) == expected, step
        if not died:
            break


def run_and_kill(corpus: Path, out: Path, workers: int, units: int, kind: int) -> int:
    """Prepare in a process of its own, killed once its journal has `units` lines; its status."""
    journal = out / ".prepare" / "journal.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(corpus), str(out), str(workers)],
        stderr=subprocess.PIPE,
    )
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if journal.read_bytes().count(b"\n") >= units:
                break
        time.sleep(0.001)
    process.send_signal(kind)
    process.communicate()
    return process.returncode


@pytest.mark.parametrize("workers", [1, 2, 5] if SLOW else [2])
def test_killed_at_random_with_any_number_of_workers(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", UNIT_BYTES)
    prepare(corpus, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    draw = random.Random(workers)
    units = 0
    for attempt in range(100 if SLOW else 2):
        kind = draw.choice([signal.SIGKILL, signal.SIGTERM])
        units += draw.randrange(1, 12)
        status = run_and_kill(corpus, tmp_path / "out", workers, units, kind)
        assert status in (0, -signal.SIGKILL, -signal.SIGTERM)
        if status == 0:
            units = 0
            assert contents(tmp_path / "out") == expected, attempt
            (tmp_path / "out").rename(tmp_path / f"done-{attempt}")
    prepare(corpus, tmp_path / "out", workers=1 + workers % 3 if SLOW else 1)
    assert contents(tmp_path / "out") == expected
    verify(tmp_path / "out", deep=True)


def watch_workers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """A list that every worker process joins when it is started."""
    started: list[subprocess.Popen[str]] = []
    original = worker_module._start_worker

    def start(settings: worker_module.EncodeSettings) -> subprocess.Popen[str]:
        started.append(original(settings))
        return started[-1]

    monkeypatch.setattr(worker_module, "_start_worker", start)
    return started


def test_killed_worker_is_replaced(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", 8000)
    prepare(corpus, tmp_path / "whole")
    started = watch_workers(monkeypatch)
    original, asked = worker_module._ask, itertools.count()

    def ask(process: subprocess.Popen[str], *unit: Any) -> dict[str, Any] | None:
        if next(asked) in (0, 3):  # one that has just begun, and one that has worked
            process.kill()
        return original(process, *unit)

    monkeypatch.setattr(worker_module, "_ask", ask)
    prepare(corpus, tmp_path / "out", workers=2)
    assert len(started) == 4, "two, and one for each that was killed"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_worker_is_replaced_before_its_memory_grows(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", 10_000)
    prepare(corpus, tmp_path / "whole")
    started = watch_workers(monkeypatch)
    monkeypatch.setattr(worker_module, "UNITS_PER_WORKER", 1)
    prepare(corpus, tmp_path / "out", workers=2)
    assert len(started) >= 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_workers_end_when_their_parent_is_killed(corpus: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(corpus), str(tmp_path / "out"), "3"]
    )
    children: list[int] = []
    deadline = time.monotonic() + 60
    while not children and process.poll() is None and time.monotonic() < deadline:
        tasks = Path(f"/proc/{process.pid}/task")
        if not Path("/proc/self/task").exists():
            pytest.skip("needs /proc with children lists")
        children = [
            int(pid) for task in tasks.glob("*/children") for pid in task.read_text().split()
        ]
    process.kill()
    process.wait()
    assert children, "it ended, or 60 s passed, before a worker was seen"
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.01)


@pytest.mark.parametrize("file", ["parts/*.tokens", "parts/*.docs", "journal.jsonl"])
def test_damaged_part_or_journal_is_done_again_not_read(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", 12_000)
    prepare(corpus, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out"  # all is encoded, nothing packed
    prepare_text(
        corpus,
        out,
        tokenizer="byte",
        shard_tokens=4000,
        val_fraction=0.2,
        workers=1,
        partition=(0, 1),
    )
    victims = sorted((out / ".prepare").glob(file))
    assert victims
    size = victims[0].stat().st_size
    for position in range(0, size, max(size // (200 if SLOW else 2), 1)):
        copy = tmp_path / f"copy-{position}"
        shutil.copytree(out, copy)
        victim = copy / victims[0].relative_to(out)
        raw = bytearray(victim.read_bytes())
        raw[position] ^= 1 << position % 8
        victim.write_bytes(raw)
        prepare(corpus, copy)
        assert contents(copy) == expected
