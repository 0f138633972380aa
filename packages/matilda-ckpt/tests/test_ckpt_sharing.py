"""Unchanged tensors share an older checkpoint's blocks, and never both of the two newest ones'."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from matilda_ckpt import Checkpointer, Keep, load_state, verify
from matilda_ckpt.fs import OsFs

FROZEN = 300_000


def state(step: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    frozen = torch.randn(FROZEN, generator=generator)
    return {"model": {"frozen": frozen, "head": torch.full((9,), step)}, "loop": {"step": step}}


def copies(root: Path, name: str = "frozen") -> dict[int, int]:
    """Step → inode of the file that holds the frozen tensor."""
    found = {}
    for path in sorted(root.glob("step-*")):
        manifest = json.loads((path / "MANIFEST.json").read_bytes())
        for file, entry in manifest["files"].items():
            if name in entry.get("tensors", {}):
                found[manifest["step"]] = (path / file).stat().st_ino
    return found


@pytest.mark.parametrize("wait", [True, False])
def test_two_copies_on_disk_serve_any_number_of_checkpoints(tmp_path: Path, wait: bool) -> None:
    with Checkpointer(tmp_path, keep=Keep(last=100)) as checkpoints:
        for step in range(1, 10):
            checkpoints.save(step, state(step), wait=wait)
    inodes = copies(tmp_path)
    assert len(inodes) == 9
    assert inodes[3] == inodes[5] == inodes[7] == inodes[9]
    assert inodes[4] == inodes[6] == inodes[8]
    assert all(inodes[step] != inodes[step + 1] for step in range(1, 9))
    for step in range(1, 10):
        path = tmp_path / f"step-{step:08d}"
        assert verify(path).ok
        loaded, expected = load_state(path)["model"], state(step)["model"]
        assert isinstance(loaded, dict)
        assert isinstance(expected, dict)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_a_restarted_writer_goes_on_sharing(tmp_path: Path) -> None:
    for step in range(1, 8):
        with Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(step, state(step))
    inodes = copies(tmp_path)
    assert inodes[5] == inodes[7] != inodes[6]


def test_rot_in_a_shared_copy_leaves_the_other_of_the_two_newest(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    for step in range(1, 8):
        checkpoints.save(step, state(step))
    inode = copies(tmp_path)[7]
    (rotten,) = [p for p in (tmp_path / "step-00000007").iterdir() if p.stat().st_ino == inode]
    data = bytearray(rotten.read_bytes())
    data[-100] ^= 1
    rotten.write_bytes(data)
    assert not verify(tmp_path / "step-00000007").ok
    assert not verify(tmp_path / "step-00000005").ok, "shared bytes rot together"
    restored = checkpoints.restore({})
    assert restored is not None
    assert restored.step == 6


def test_rotten_bytes_are_never_shared_with_a_new_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    for step in range(1, 7):
        checkpoints.save(step, state(step))
    inode = copies(tmp_path)[5]
    (rotten,) = [p for p in (tmp_path / "step-00000005").iterdir() if p.stat().st_ino == inode]
    data = bytearray(rotten.read_bytes())
    data[-100] ^= 1
    rotten.write_bytes(data)
    path = checkpoints.save(7, state(7)).path
    assert verify(path).ok
    assert copies(tmp_path)[7] not in (inode, copies(tmp_path)[6])


def test_newest_two_keep_own_copies_when_one_between_is_gone(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, keep=Keep(last=100))
    for step in range(1, 8):
        checkpoints.save(step, state(step))
    inode = copies(tmp_path)[6]
    (rotten,) = [p for p in (tmp_path / "step-00000006").iterdir() if p.stat().st_ino == inode]
    rotten.write_bytes(b"gone")
    checkpoints.save(8, state(8))
    inodes = copies(tmp_path)
    assert inodes[8] != inodes[7]


def test_a_still_tensor_that_moves_again_is_written(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    for step in range(1, 7):
        checkpoints.save(step, state(step))
    moved = state(7)
    assert isinstance(moved["model"], dict)
    moved["model"]["frozen"][7] = 1.5
    path = checkpoints.save(7, moved).path
    loaded = load_state(path)["model"]
    assert isinstance(loaded, dict)
    assert torch.equal(loaded["frozen"], moved["model"]["frozen"])


@pytest.mark.parametrize("arguments", [{"share_bytes": None}, {"share_bytes": 10_000_000}])
def test_sharing_can_be_turned_off_and_small_parts_are_not_worth_it(
    tmp_path: Path, arguments: dict[str, int | None]
) -> None:
    checkpoints = Checkpointer(tmp_path, keep=Keep(last=100), **arguments)
    for step in range(1, 8):
        checkpoints.save(step, state(step))
    assert len(set(copies(tmp_path).values())) == 7
    assert not list(tmp_path.glob("step-*/*-of-*"))


class NoLinks(OsFs):
    """Where neither clones nor hard links exist."""

    def link(self, src: str, dst: str) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), dst)


class FailingSync(OsFs):
    def fsync_file(self, path: str) -> None:
        raise OSError(errno.EIO, "injected", path)


def test_without_links_everything_is_written(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, fs=NoLinks(), keep=Keep(last=100))
    for step in range(1, 8):
        checkpoints.save(step, state(step))
    assert len(set(copies(tmp_path).values())) == 7
    assert verify(tmp_path / "step-00000007").ok


def test_an_error_while_sharing_fails_the_save_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, fs=FailingSync())
    for step in range(1, 5):
        checkpoints.save(step, state(step))
    with pytest.raises(Exception, match=r"step 5 was not saved.*injected"):
        checkpoints.save(5, state(5))
    assert [info.step for info in checkpoints.list()] == [4, 3, 2]
    assert all(verify(info.path).ok for info in checkpoints.list())


@pytest.fixture(params=["xfs", "btrfs"])
def cloning_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system that copies on write, in a file."""
    mkfs = shutil.which(f"mkfs.{request.param}")
    if mkfs is None or os.geteuid() != 0:
        pytest.skip(f"CLONES ON {request.param} NOT TESTED: needs root and mkfs.{request.param}")
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    image.touch()
    os.truncate(image, 400 << 20)
    subprocess.run([mkfs, "-q", image], check=True)
    folder.mkdir()
    mounted = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"CLONES ON {request.param} NOT TESTED: {mounted.stderr.decode()[-200:]}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_blocks_are_cloned_where_the_file_system_can(cloning_disk: Path) -> None:
    big = {"model": {"frozen": torch.randn(8_000_000), "head": torch.zeros(9)}}
    used = []
    with Checkpointer(cloning_disk, keep=Keep(last=100)) as checkpoints:
        for step in range(1, 9):
            big["model"]["head"].fill_(step)
            path = checkpoints.save(step, big).path
            os.sync()
            info = os.statvfs(cloning_disk)
            used.append((info.f_blocks - info.f_bfree) * info.f_frsize)
    assert len(set(copies(cloning_disk).values())) == 8, "clones have inodes of their own"
    assert used[3] - used[0] > 80e6
    assert used[7] - used[3] < 4e6
    assert verify(path).ok
