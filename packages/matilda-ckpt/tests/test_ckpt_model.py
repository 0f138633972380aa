"""Every crash point and durable state in the model; every seeded bug is caught."""

from __future__ import annotations

import os

import pytest

from matilda_ckpt.torture.memfs import MemFs
from matilda_ckpt.torture.model import SCENARIOS, explore
from matilda_ckpt.torture.seeded_bugs import BUGS

SLOW = {"two writers"}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_crash_loses_or_tears_anything(scenario: str) -> None:
    if scenario in SLOW and os.environ.get("MATILDA_SLOW") != "1":
        pytest.skip("17 s; run with MATILDA_SLOW=1")
    verdict = explore(scenario)
    assert verdict.violations == []
    assert verdict.states > verdict.crash_points > 50


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bug_is_caught(bug: str) -> None:
    seeded = BUGS[bug]
    verdict = explore(seeded.scenario, seeded.make, seeded.fs())
    assert verdict.violations, f"the suite does not notice: {bug}"


def test_model_loses_what_posix_may_lose() -> None:
    fs = MemFs()
    fs.mkdir("/d")
    fs.fsync_dir("/")
    file = fs.create("/d/a", 4)
    file.write(memoryview(b"data"))
    states = {
        bytes(node.data) if node else None
        for state in fs.crash_states()
        for node in [state._find("/d/a")]
    }
    assert states == {None, b"", b"data", bytes(4), b"da"}
    file.fsync()
    fs.fsync_dir("/d")
    (only,) = fs.crash_states()
    assert bytes(only._find("/d/a").data) == b"data"
    fs.rename_noreplace("/d/a", "/d/b")
    names = [tuple(e.name for e in s.listdir("/d")) for s in fs.crash_states()]
    assert sorted(names) == [("a",), ("b",)]
