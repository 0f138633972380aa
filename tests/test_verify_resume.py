"""`verify_resume` kills for real; it finds no difference where none is, and names one that is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from matilda_train.phases import PHASES, PhaseClock
from matilda_train.verify_resume import compare, verify_resume


def test_kills_in_every_phase_leave_no_difference(
    tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    report = verify_resume(
        tiny_config, work_dir=tmp_path / "proof", data_dir=corpus, kills=16, seed=1
    )
    assert report.differences == []
    assert report.n_kills == 16
    assert report.runs >= 2
    assert {name for name, _ in report.kills} == {"SIGKILL", "SIGTERM"}
    assert len({phase for _, phase in report.kills}) >= 5


@pytest.mark.slow
def test_five_hundred_kills_leave_no_difference(
    tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    report = verify_resume(
        tiny_config, work_dir=tmp_path / "proof", data_dir=corpus, kills=500, seed=2
    )
    assert report.differences == []


def test_differences_are_named() -> None:
    rows = [{"step": 1, "loss_nats": 2.0}, {"step": 2, "loss_nats": 1.5}]
    other = [{"step": 1, "loss_nats": 2.0}, {"step": 2, "loss_nats": 1.25}]
    state = {"/model/embed": "aa", "/loop/step": "bb"}
    assert compare("v", state, rows, state, rows) == []
    found = compare("v", state | {"/model/embed": "cc"}, other[:2], state, rows)
    assert [("/model/embed" in f, "step 2" in f) for f in found] == [(True, False), (False, True)]
    assert "1 metrics rows, the twin has 2" in compare("v", state, rows[:1], state, rows)[0]


def test_directory_in_use_is_refused(tiny_config: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        verify_resume(tiny_config, work_dir=tmp_path, data_dir=corpus, kills=1)


def test_bad_config_is_refused_before_anything_runs(tmp_path: Path, corpus: Path) -> None:
    config = tmp_path / "bad.json"
    config.write_text(json.dumps({"train": {"total_stepz": 3}}))
    with pytest.raises(ValueError, match="total_steps"):
        verify_resume(config, work_dir=tmp_path / "proof", data_dir=corpus, kills=1)
    assert not (tmp_path / "proof").exists()


def test_every_second_belongs_to_one_phase() -> None:
    met: list[str] = []
    clock = PhaseClock(met.append)
    with clock.during("preparing data"):
        clock.enter("preparing data")
    clock.enter("training")
    assert met == ["starting", "preparing data", "preparing data", "starting", "training"]
    assert set(clock.seconds()) == {"starting", "preparing data", "training"}
    assert all(phase in PHASES for phase in met)
