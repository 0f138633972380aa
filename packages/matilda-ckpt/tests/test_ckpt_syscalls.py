"""A real process killed, or given errors, at its system calls."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from matilda_ckpt import Checkpointer, SaveError
from matilda_ckpt.torture import syscalls, writer

FULL = os.environ.get("MATILDA_SLOW") == "1"


def run(tmp_path: Path, fault: str) -> None:
    reason = syscalls.why_not()
    if reason:
        pytest.skip(reason)
    points = 0
    calls = syscalls.CALLS if FULL else syscalls.CHANGING_CALLS
    for verdict in syscalls.sweep(tmp_path, [fault], calls=calls, every=1 if FULL else 8):
        assert verdict.violations == []
        points += verdict.points
    assert points > (200 if FULL else 6)


def test_sigkill_at_system_calls_of_a_save_and_of_retention(tmp_path: Path) -> None:
    run(tmp_path, syscalls.KILL)


@pytest.mark.parametrize("fault", syscalls.ERRORS if FULL else ("EIO",))
def test_error_at_system_calls_is_reported_and_the_retry_works(tmp_path: Path, fault: str) -> None:
    run(tmp_path, fault)


def test_short_writes_and_interruptions_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    real = os.write

    def short(fd: int, data: memoryview) -> int:
        return real(fd, data[: max(1, rng.randrange(len(data)))])

    checkpoints = Checkpointer(tmp_path)
    weight = torch.randn(5000)
    monkeypatch.setattr(os, "write", short)
    checkpoints.save(1, {"w": weight})
    monkeypatch.undo()
    assert torch.equal(checkpoints.load_state()["w"], weight)


@pytest.mark.parametrize("fault", ["EOPNOTSUPP", "EINTR:when=1"])
def test_space_that_cannot_be_reserved_is_not_written_instead(tmp_path: Path, fault: str) -> None:
    """NFS before 4.2 has no fallocate, and glibc's own stand-in writes into every 4 KiB."""
    reason = syscalls.why_not()
    if reason:
        pytest.skip(reason)
    (tmp_path / "seed").mkdir()
    log = tmp_path / "log"
    options = [*("-f", "-y", "-o", str(log)), *("-e", "trace=fallocate,pwrite64")]
    root = tmp_path / "checkpoints"
    done = syscalls._spawn(
        tmp_path / "seed", root, [*options, "-e", f"inject=fallocate:error={fault}"]
    )
    assert done.returncode == 0, done.stderr
    assert writer.judge(str(root), syscalls.SEEDED + 2) is None
    calls = [line for line in log.read_text().splitlines() if str(root) in line]
    injected = sum("INJECTED" in line for line in calls)
    assert injected == (1 if fault == "EINTR:when=1" else sum("fallocate(" in c for c in calls))
    assert sum("fallocate(" in line for line in calls) >= 8
    assert [line for line in calls if "pwrite64(" in line and "/LOCK>" not in line] == []


def test_write_without_progress_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda _fd, _data: 0)
    with pytest.raises(SaveError, match="no progress"):
        Checkpointer(tmp_path).save(1, {"x": 1})


def test_retry_after_a_failed_fsync_uses_a_fresh_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fsync the kernel may drop the data and call the next fsync a success."""
    real, opened = os.fsync, []

    def failing(fd: int) -> None:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        opened.append(path)
        if path.endswith("x.json") and sum(p.endswith("x.json") for p in opened) == 1:
            raise OSError(errno.EIO, "injected")
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    checkpoints = Checkpointer(tmp_path)
    with pytest.raises(SaveError, match="injected"):
        checkpoints.save(1, {"x": 1})
    checkpoints.save(1, {"x": 1})
    synced = [p for p in opened if p.endswith("x.json")]
    assert len(set(synced)) == len(synced) == 2


def test_judge_notices_a_lost_acknowledgement(tmp_path: Path) -> None:
    store = writer.open_store(str(tmp_path))
    store.save(writer.request(1))
    assert writer.judge(str(tmp_path), 1) is None
    assert "lost" in str(writer.judge(str(tmp_path), 2))
