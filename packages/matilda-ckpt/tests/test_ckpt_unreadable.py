"""A checkpoint that the system refuses to read is not damaged: it is named, and stays."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from matilda_ckpt import (
    Checkpointer,
    DamagedError,
    Keep,
    Scrubber,
    UnreadableError,
    verify,
)
from matilda_ckpt.catalog import Catalog
from matilda_ckpt.cli import main
from matilda_ckpt.fs import OsFs
from matilda_ckpt.object_fs import _as_os_errors

NOBODY = 65534


@contextmanager
def refused(file: Path, root: Path) -> Iterator[None]:
    """Run by a user who owns all of `root` but may not read `file`."""
    if os.geteuid() != 0:
        file.chmod(0)
        yield
        file.chmod(0o600)
        return
    for path in (root, *root.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    os.chown(file, 0, 0)
    file.chmod(0o600)
    closed = {p: p.stat().st_mode for p in root.parents if not p.stat().st_mode & 0o001}
    for parent, mode in closed.items():
        parent.chmod(mode | 0o011)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent, mode in closed.items():
            parent.chmod(mode)
        os.chown(file, NOBODY, NOBODY)


@pytest.fixture
def two_saves(tmp_path: Path) -> Path:
    root = tmp_path / "checkpoints"
    with Checkpointer(root) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"count": {"steps": step}})
    return root


def entries(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


@pytest.mark.parametrize("file", ["COMMIT", "MANIFEST.json", "count.json"])
def test_it_is_named_and_nothing_is_moved_or_deleted(
    two_saves: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = two_saves / "step-00000002"
    before = entries(two_saves)
    with refused(newest / file, two_saves), Checkpointer(two_saves) as checkpoints:
        with pytest.raises(UnreadableError, match=f"`{file}` cannot be read: Permission denied"):
            checkpoints.restore({"count": None})
        with pytest.raises(UnreadableError, match="stays where it is"):
            checkpoints.load_state()
        (stays,) = checkpoints.repair()
        assert (stays.step, stays.moved_to) == (2, None)
        assert "Permission denied" in stays.reason
        scrubber = Scrubber(two_saves)
        turns = {scrubber.scrub_one() for _ in range(2)}
        assert turns == {"step-00000001", "step-00000002"}
        assert (list(scrubber.passed_over), scrubber.damaged) == (["step-00000002"], {})
        assert "Permission denied" in str(verify(newest).problem)
        assert checkpoints.list()[0].unreadable == (file != "count.json")
        assert main(["verify", str(two_saves)]) == 1
        said = capsys.readouterr().out
        assert re.search(r"step-00000001 +ok ", said)
        assert re.search(r"step-00000002 +unreadable ", said)
        assert entries(two_saves) == before
        # Saving goes on beside it, and retention does not count it among the two that it keeps.
        checkpoints.save(3, {"count": {"steps": 3}})
        checkpoints.retire(Keep(last=1))
        assert {"step-00000001", "step-00000002", "step-00000003"} <= entries(two_saves)
    with Checkpointer(two_saves) as checkpoints:
        restored = checkpoints.restore({"count": None}, step=2)
        assert restored is not None
        assert restored.state == {"count": {"steps": 2}}


class Refusing(OsFs):
    """Every file is answered by `code`."""

    code = errno.EMFILE

    def open_read(self, path: str):  # type: ignore[no-untyped-def]
        raise OSError(self.code, os.strerror(self.code), path)


def test_a_save_beside_one_that_cannot_be_read_is_newer_than_it(two_saves: Path) -> None:
    with Checkpointer(two_saves) as checkpoints:
        commit = two_saves / "step-00000002" / "COMMIT"
        with refused(commit, two_saves):
            checkpoints.save(3, {"count": {"steps": 10}})
        restored = checkpoints.restore({})
    assert restored is not None
    assert restored.state["count"] == {"steps": 10}


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.ESTALE, errno.EIO])
def test_only_what_tells_of_the_content_is_damage(two_saves: Path, code: int) -> None:
    fs = Refusing()
    fs.code = code
    with pytest.raises(DamagedError if code == errno.EIO else UnreadableError):
        Catalog(fs, str(two_saves)).open("step-00000002")


def test_an_object_store_that_fails_tells_nothing_of_the_object() -> None:
    for failure in (OSError(errno.EIO, "slow down"), RuntimeError("connection reset")):
        with pytest.raises(TimeoutError, match=r"slow down|connection reset"):  # noqa: SIM117
            with _as_os_errors("s3://bucket/step-00000002/COMMIT"):
                raise failure
    with pytest.raises(FileNotFoundError), _as_os_errors("s3://bucket/gone"):
        raise FileNotFoundError("gone")
