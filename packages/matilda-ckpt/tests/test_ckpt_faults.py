"""Real faults: SIGKILL in the middle of a save, a full disk, a second writer, damaged bytes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from matilda_ckpt import (
    Checkpointer,
    DamagedError,
    Keep,
    LockedError,
    NoValidCheckpointError,
    SaveError,
    verify,
)
from matilda_ckpt.fs import OsFs

WRITER = """
import sys
from matilda_ckpt import Checkpointer
import numpy as np
c = Checkpointer(sys.argv[1])
step = 0
restored = c.restore({})
if restored:
    step = restored.step
while True:
    step += 1
    c.save(step, {"x": {"step": step, "data": np.full(200_000, step)}})
    print(step, flush=True)
"""


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigkill_at_random_moments_never_loses_an_acknowledged_save(tmp_path: Path) -> None:
    acknowledged = 0
    for attempt in range(6):
        child = spawn(WRITER, tmp_path)
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line, child.stderr.read() if child.stderr else ""
        acknowledged = int(line)
        time.sleep(0.003 * attempt)
        child.send_signal(signal.SIGKILL)
        rest = child.communicate()[0].split()
        assert child.returncode == -signal.SIGKILL
        acknowledged = int(rest[-1]) if rest else acknowledged
        state = Checkpointer(tmp_path, read_only=True).load_state()["x"]
        assert state["step"] in (acknowledged, acknowledged + 1)
        assert (state["data"] == state["step"]).all()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(10**6, {"x": 1})
        leftovers = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_second_live_process_is_refused_and_welcome_after_a_kill(tmp_path: Path) -> None:
    child = spawn(WRITER, tmp_path)
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(LockedError, match="another process is writing checkpoints to"):
        Checkpointer(tmp_path).save(1, {"x": 1})
    with pytest.raises(LockedError):
        Checkpointer(tmp_path).restore({})
    assert Checkpointer(tmp_path, read_only=True).restore({}) is not None
    child.kill()
    child.communicate()
    Checkpointer(tmp_path).save(10**6, {"x": 1})


def test_lock_is_released_by_close_and_by_garbage_collection(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path)
    first.save(1, {"x": 1})
    with pytest.raises(LockedError):
        Checkpointer(tmp_path).save(2, {"x": 1})
    first.close()
    Checkpointer(tmp_path).save(2, {"x": 1})
    Checkpointer(tmp_path).save(3, {"x": 1})


def test_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = """
import os, sys, time
from matilda_ckpt import Checkpointer
c = Checkpointer(sys.argv[1])
c.save(1, {"x": 1})
ready, tell = os.pipe()
pid = os.fork()
if pid == 0:
    os.write(tell, b"x")
    time.sleep(60)
os.read(ready, 1)
print(pid, flush=True)
time.sleep(60)
"""
    child = spawn(code, tmp_path)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    try:
        child.kill()
        child.wait()
        Checkpointer(tmp_path).save(2, {"x": 1})
    finally:
        os.kill(grandchild, signal.SIGKILL)
        child.communicate()


def test_writer_whose_lock_file_was_taken_over_stops_before_publishing(tmp_path: Path) -> None:
    zombie = Checkpointer(tmp_path)
    zombie.save(1, {"x": 1})
    (tmp_path / "LOCK").unlink()
    with Checkpointer(tmp_path) as heir:
        heir.save(2, {"x": 2})
        with pytest.raises(LockedError, match="taken over"):
            zombie.save(3, {"x": 3})
        assert [info.step for info in heir.list()] == [2, 1]
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_stale_temporaries_are_removed_and_strangers_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("1")
    root = tmp_path / "c"
    (root / ".tmp-step-00000001-dead").mkdir(parents=True)
    (root / ".tmp-step-00000001-dead" / "part").write_text("x")
    (root / ".tmp-step-00000001-dead" / "link").symlink_to(outside)
    (root / ".trash-x").mkdir()
    (root / "notes.txt").write_text("mine")
    (root / ".tmp-link").symlink_to(outside)
    Checkpointer(root).save(1, {"x": 1})
    names = {p.name for p in root.iterdir()}
    assert names == {"LOCK", "notes.txt", "step-00000001", ".tmp-link"}
    assert (outside / "precious").exists()


def test_file_size_limit_fails_the_save_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"x": torch.ones(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SaveError, match=r"step 2 was not saved.*[Ff]ile too large.*untouched"):
            checkpoints.save(2, {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    restored = checkpoints.restore({})
    assert restored is not None
    assert restored.step == 1
    checkpoints.save(2, {"x": torch.ones(100_000)})


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Path:
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_is_found_before_a_byte_is_written(tiny_disk: Path) -> None:
    with Checkpointer(tiny_disk / "c") as checkpoints:
        checkpoints.save(1, {"x": torch.ones(100_000)})
        with pytest.raises(SaveError, match=r"needs 4\.0 MB and the file system has .* MB free"):
            checkpoints.save(2, {"x": torch.ones(1_000_000)})
        assert [info.step for info in checkpoints.list()] == [1]
        assert verify(checkpoints.list()[0].path).ok


def test_the_message_of_a_full_disk_adds_up(tmp_path: Path) -> None:
    class NearlyFull(OsFs):
        def free_bytes(self, path: str) -> int:
            return 2_500_000

    with pytest.raises(
        SaveError, match=r"needs 2\.0 MB .* 2\.5 MB free, of which 1\.0 MB must stay"
    ):
        Checkpointer(tmp_path / "c", fs=NearlyFull()).save(1, {"x": torch.ones(500_000)})


class BlindFs(OsFs):
    """A file system that misreports free space, as quotas and other tenants make it."""

    def free_bytes(self, path: str) -> int:
        return 1 << 60


def test_disk_that_fills_up_in_spite_of_the_preflight(tiny_disk: Path) -> None:
    with Checkpointer(tiny_disk / "c", fs=BlindFs()) as checkpoints:
        checkpoints.save(1, {"x": torch.ones(100_000)})
        for _ in range(3):
            with pytest.raises(SaveError, match="No space left"):
                checkpoints.save(2, {"x": torch.ones(1_000_000)})
        left = (tiny_disk / "c").iterdir()
        assert [path.name for path in left if path.name.startswith(".")] == []
        restored = checkpoints.restore({})
        assert restored is not None
        assert restored.step == 1


def two_steps(root: Path) -> Checkpointer:
    checkpoints = Checkpointer(root)
    for step in (1, 2):
        checkpoints.save(
            step,
            {"model": {"a": torch.full((2000,), step), "b": torch.ones(3)}, "loop": {"s": step}},
        )
    return checkpoints


FILES = ("COMMIT", "MANIFEST.json", "model.safetensors", "model.json", "loop.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "empty", "swap", "remove", "grow"])
def test_damage_is_found_named_quarantined_and_survived(
    tmp_path: Path, file: str, damage: str
) -> None:
    checkpoints = two_steps(tmp_path)
    path = tmp_path / "step-00000002" / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "truncate":
        del data[-1]
    elif damage == "zero":
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    elif damage == "empty":
        data.clear()
    elif damage == "swap":
        data = bytearray((tmp_path / "step-00000001" / file).read_bytes())
        if data == path.read_bytes():  # the tree of both steps is the same; the seal is not
            data = bytearray((tmp_path / "step-00000001" / "COMMIT").read_bytes())
    elif damage == "grow":
        data += b"\n"
    path.unlink()
    if damage != "remove":
        path.write_bytes(data)
    named = "MANIFEST.json" if file == "COMMIT" and damage == "swap" else file
    report = verify(path.parent)
    assert not report.ok
    assert f"`{named}`" in str(report.problem)
    restored = checkpoints.restore({})
    assert restored is not None
    assert restored.step == 1
    (skip,) = restored.skipped
    assert skip.moved_to is not None
    assert skip.moved_to.is_dir()
    assert f"`{named}`" in skip.reason
    reason = json.loads(Path(f"{skip.moved_to}.reason.json").read_text())
    assert reason["checkpoint"] == "step-00000002"
    checkpoints.save(2, {"loop": 3})
    assert [info.step for info in checkpoints.list()] == [2, 1]


def test_damaged_tensor_is_named(tmp_path: Path) -> None:
    two_steps(tmp_path)
    path = tmp_path / "step-00000002" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"`model\.safetensors` has a damaged tensor 'b'"):
        Checkpointer(tmp_path).restore({}, step=2)
    assert path.exists()


def test_links_and_extra_files_are_refused(tmp_path: Path) -> None:
    checkpoints = two_steps(tmp_path)
    newest = tmp_path / "step-00000002"
    real = tmp_path / "real.json"
    shutil.move(newest / "loop.json", real)
    (newest / "loop.json").symlink_to(real)
    assert "not a regular file" in str(verify(newest).problem)
    (newest / "loop.json").unlink()
    shutil.move(real, newest / "loop.json")
    assert verify(newest).ok
    (newest / "extra.bin").write_text("?")
    assert "`extra.bin` is not part of this checkpoint" in str(verify(newest).problem)
    restored = checkpoints.restore({})
    assert restored is not None
    assert restored.step == 1


def test_hidden_files_of_desktops_and_network_file_systems_are_no_damage(tmp_path: Path) -> None:
    checkpoints = two_steps(tmp_path)
    newest = tmp_path / "step-00000002"
    (newest / ".DS_Store").write_text("?")
    (newest / ".nfs000000000123").write_text("?")
    assert verify(newest).ok
    restored = checkpoints.restore({})
    assert restored is not None
    assert (restored.step, len(restored.skipped)) == (2, 0)
    for step in (3, 4):
        checkpoints.save(step, {"loop": step})
    assert checkpoints.retire(Keep(last=2)) == ["step-00000002"]
    assert not newest.exists()


def test_all_damaged_is_an_error_never_a_fresh_start(tmp_path: Path) -> None:
    checkpoints = two_steps(tmp_path)
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}" / "COMMIT").unlink()
    with pytest.raises(NoValidCheckpointError, match=r"2 checkpoint\(s\) and none") as moved:
        checkpoints.restore({})
    assert "2 damaged lie in `quarantine` now: put an intact copy" in str(moved.value)
    with pytest.raises(NoValidCheckpointError, match=r"only 2 damaged in `quarantine`; put an in"):
        checkpoints.restore({})
    assert len(list((tmp_path / "quarantine").glob("*.reason.json"))) == 2


def test_read_only_restore_falls_back_without_moving_anything(tmp_path: Path) -> None:
    two_steps(tmp_path).close()
    (tmp_path / "step-00000002" / "COMMIT").unlink()
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    restored = Checkpointer(tmp_path, read_only=True).restore({})
    assert restored is not None
    assert restored.step == 1
    assert restored.skipped[0].moved_to is None
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
