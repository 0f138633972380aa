"""The loss as a picture: what is in it, for runs in any state, with axes that people can read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matilda_train import config_from_dict, draw_loss
from matilda_train.config_load import config_to_dict
from matilda_train.report.loss_picture import HEIGHT, TOP, WIDTH, Axis

SVG = "{http://www.w3.org/2000/svg}"


def make_run(path: Path, losses: list[float | None], events: list[dict[str, Any]]) -> Path:
    """A run of 1,000 tokens a step, evaluated at every tenth, and what happened to it."""
    path.mkdir(parents=True)
    config = config_to_dict(config_from_dict({"train": {"tokens_per_step": 1024}}))
    run = {"config": config, "run_id": "ab12", "data_id": "cd"}
    (path / "run.json").write_text(json.dumps(run))
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    with (path / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            file.write(json.dumps({"step": step, "tokens": 1000 * step, "loss_nats": loss}) + "\n")
            if step % 10 == 0:
                evaluation = {"val_loss_nats": (loss or 0.0) + 0.5, "val_bits_per_byte": 1.0}
                file.write(json.dumps({"step": step, "tokens": 1000 * step} | evaluation) + "\n")
    return path


def told(root: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def at(time: int, event: str, **fields: Any) -> dict[str, Any]:
    return {"time": f"2030-01-01T00:0{time}:00+00:00", "event": event, **fields}


def test_a_killed_run_shows_loss_evaluations_and_the_kill(tmp_path: Path) -> None:
    losses: list[float | None] = [10 / math.sqrt(step) for step in range(1, 101)]
    losses[49] = None  # a step that was skipped
    events = [at(0, "start", step=0), at(1, "resume", step=40, lost_seconds=3.0)]
    run = make_run(tmp_path / "a<b", losses, events)
    out = draw_loss([run], tmp_path / "loss.svg")
    root = ElementTree.fromstring(out.read_text())
    raw, smoothed, stop = [p for p in root.iter(f"{SVG}path") if p.get("opacity", "1") != ""][-3:]
    assert raw.get("opacity") == "0.35"
    # From the second step on: the first 2 % of the tokens may lie above the picture.
    assert raw.get("d", "").count("L") + 1 == 99 - 1
    assert smoothed.get("stroke-width") == "2"
    assert stop.get("d", "").startswith("M411.2 ")  # 40 of 100 steps of the width
    assert "killed or crashed, resumed at step 40, 3 s of work redone" in told(root)
    rings = list(root.iter(f"{SVG}circle"))
    assert len(rings) == 10 - 1  # the evaluation beside the skipped step counts as 0.5: below
    assert all(TOP <= float(ring.get("cy", "0")) <= HEIGHT for ring in rings)
    assert out.read_bytes() == draw_loss([run], tmp_path / "again.svg").read_bytes()


def test_several_runs_have_a_colour_and_a_name_each(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, [3.0, 2.5, 2.0], []) for name in ("a", "b&c")]
    root = ElementTree.fromstring(draw_loss(runs, tmp_path / "loss.svg").read_text())
    colours = {p.get("stroke") for p in root.iter(f"{SVG}path") if p.get("stroke-width") == "2"}
    assert len(colours) == 2
    assert any("━ a" in text and "━ b&c" in text for text in told(root))


@pytest.mark.parametrize("losses", [[], [3.0], [None, None, 3.0]])
def test_a_run_without_two_losses_is_told_of(losses: list[float | None], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run has two logged steps"):
        draw_loss([make_run(tmp_path / "run", losses, [])], tmp_path / "loss.svg")
    assert not (tmp_path / "loss.svg").exists()


def test_a_picture_that_cannot_be_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [3.0, 2.5, 2.0], [])
    for out in (tmp_path / "none" / "loss.svg", tmp_path):
        with pytest.raises(ValueError, match=r"a file in a folder that is there.*`--svg`"):
            draw_loss([run], out)


def test_equal_losses_make_a_line_in_the_middle(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [2.0] * 5, [])
    root = ElementTree.fromstring(draw_loss([run], tmp_path / "loss.svg").read_text())
    lines = [p.get("d", "") for p in root.iter(f"{SVG}path") if p.get("stroke-width") == "2"]
    assert lines[0].endswith(" 196.0")


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e12))
def test_an_axis_has_few_round_numbers_inside_its_range(low: float, width: float) -> None:
    axis = Axis(low, low + width, 0.0, float(WIDTH))
    if axis.high <= axis.low:
        return
    ticks = axis.ticks()
    assert 4 <= len(ticks) <= 13
    slack = 1e-6 * (axis.high - axis.low) + 1e-6 * max(abs(axis.low), abs(axis.high))
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in ticks)
    size = ticks[1] - ticks[0]
    assert float(f"{size:.0e}") == pytest.approx(size, rel=1e-3)  # one digit


def test_a_picture_of_no_run_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run directory"):
        draw_loss([], tmp_path / "loss.svg")
