"""What a folder that several processes share holds while, and after, one of them writes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from matilda_train.whole_file import remove_abandoned, write_whole


def test_a_file_is_replaced_in_a_folder_made_for_it(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file.bin"
    for content in (b"first", b"second"):
        write_whole(file, content)
        assert file.read_bytes() == content
    assert list(file.parent.iterdir()) == [file]


def test_a_disk_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.bin"
    write_whole(file, b"first")

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_whole(file, b"second")
    assert file.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_goes_and_what_another_writes_now_stays(tmp_path: Path) -> None:
    writing = tmp_path / ".file.bin.0123abcd.partial"
    abandoned = tmp_path / ".file.bin.4567cdef.partial"
    kept = tmp_path / "file.bin"
    for file in (writing, abandoned, kept):
        file.write_bytes(b"x")
    yesterday = time.time() - 24 * 3600
    for file in (abandoned, kept):
        os.utime(file, (yesterday, yesterday))
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == [writing, kept]
    remove_abandoned(tmp_path / "missing")
