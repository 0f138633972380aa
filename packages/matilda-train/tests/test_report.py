"""Reports of runs in every state, read from their files alone."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import matilda_model
import matilda_optim
import matilda_train
from matilda_train import config_from_dict
from matilda_train.config_load import config_to_dict
from matilda_train.report.page import render
from matilda_train.report.run_record import MOST_POINTS, name_runs, read_run, thin
from matilda_train.report.section import replace_section
from matilda_train.run_dir import write_output

CONFIG: dict[str, Any] = {
    "model": {"d_model": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 32},
    "train": {"total_steps": 8, "tokens_per_step": 320},
}
EVENTS = [
    ("00:00:10", "start", {"step": 0, "seconds": {"starting": 10.0}}),
    ("00:00:20", "save", {"step": 4, "seconds": {"starting": 10.0, "training": 10.0}}),
    (
        "00:01:10",
        "resume",
        {
            "step": 4,
            "seconds": {"starting": 10.0},
            "lost_seconds": 2.0,
            "last_seen": {"restarts": 0, "uptime_seconds": 22.0},
        },
    ),
    ("00:01:15", "skip", {"step": 6, "consecutive": 1}),
]


def make_run(path: Path, lr: float = 0.02) -> Path:
    """A run that was killed once and is now in progress, at step 7 of 8."""
    path.mkdir(parents=True)
    config = config_to_dict(config_from_dict(CONFIG | {"optim": {"lr": lr}}))
    run = {"config": config, "run_id": "ab12", "data_id": "cd", "device": "cpu <1>"}
    (path / "run.json").write_text(json.dumps(run))
    events = [{"time": f"2030-01-01T{t}+00:00", "event": e, **f} for t, e, f in EVENTS]
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    rows: list[dict[str, Any]] = [{"step": 0, "val_loss_nats": 5.0, "val_bits_per_byte": 7.0}]
    for step in range(1, 8):
        rows.append(
            {
                "step": step,
                "tokens": step * 320,
                "loss_nats": None if step == 6 else 5.0 - step / 10,
                "grad_norm": 1.0 / step,
                "tokens_per_second": 320.0,
                "step_ms": 1000.0,
                "train_seconds": 1.0,
                "skipped": step == 6,
                "restarts": int(step > 4),
                "uptime_seconds": 10.0 + (step if step <= 4 else step - 4),
            }
        )
    rows.insert(5, {"step": 4, "val_loss_nats": 4.0, "val_bits_per_byte": 6.5, "restarts": 0})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text + '{"step": 8, "lo')
    (path / "samples").mkdir()
    (path / "samples" / "step-00000004.txt").write_text("if a < b && </script>: pass")
    return path


def test_a_run_in_progress_with_a_line_cut_short(tmp_path: Path) -> None:
    record = read_run(make_run(tmp_path / "run"), "run")
    assert [row["step"] for row in record.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert record.status == "running, or killed"
    assert record.best_evaluation is not None
    assert record.best_evaluation["val_bits_per_byte"] == 6.5
    assert record.median("tokens_per_second") == 320
    assert [row["tokens"] for row in record.evaluations] == [0, 4 * 320]
    # The second life began 60 s after the first, whatever its own clock says.
    assert record.steps[4]["seconds"] == pytest.approx(60 + 11)
    kinds = [(mark["kind"], mark["step"]) for mark in record.marks]
    assert kinds == [("kill", 4), ("skip", 6)]
    assert "2 s of work redone" in record.marks[0]["text"]
    assert record.columns()["loss_nats"][5] is None


@pytest.mark.parametrize("field", ["uptime_seconds", "train_seconds", "loss_nats", "step"])
def test_numbers_that_json_has_not_do_not_break_the_page(field: str, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    for bad in ("NaN", "Infinity", "-Infinity"):
        with (path / "metrics.jsonl").open("a") as file:
            file.write(
                "\n" + json.dumps({"step": 8, "restarts": 1} | {field: 0.0})[:-4] + f"{bad}}}"
            )
    page = render([read_run(path, "run")], "")
    data = page.partition('id="data">')[2].partition("</script>")[0]
    json.loads(data, parse_constant=pytest.fail)


def test_whatever_number_an_evaluation_holds_is_there_to_draw(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    tasks = {"piqa": {"acc": 0.6, "by": "likelihood"}, "arc_easy": {"acc": 0.5}}
    rows = [
        {"step": 4, "val_loss_nats": 4.0, "task_scores": tasks},
        {"step": 6, "tokens": 1920, "task_scores": {"piqa": {"acc": 0.7}}},
    ]
    with (path / "metrics.jsonl").open("a") as file:
        file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    record = read_run(path, "run")
    assert len(record.steps) == 7
    columns = record.evaluation_columns()
    assert columns["task_scores/piqa/acc"] == [None, None, 0.6, 0.7]
    assert columns["task_scores/arc_easy/acc"] == [None, None, 0.5, None]
    assert set(columns["task_scores/piqa/by"]) == {None}


def test_sources_and_tasks_become_columns_in_order_of_steps(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    late = {"step": 4, "val_loss_nats": 4.0, "val_bits_per_byte_by_source": {"prose": 6.0}}
    later = {"step": 2, "tokens": 640, "task_scores": {"piqa": {"acc": 0.5, "acc_norm": None}}}
    text = "".join(json.dumps(row) + "\n" for row in (late, later))
    (path / "metrics.jsonl").write_text(text)
    record = read_run(path, "run")
    assert record.steps == []
    columns = record.evaluation_columns()
    assert columns["step"] == [2, 4]
    assert columns["task_scores/piqa/acc"] == [0.5, None]
    assert columns["val_bits_per_byte_by_source/prose"] == [None, 6.0]
    assert record.goodput.seconds["productive"] == 0  # scores are no steps


def test_equal_runs_give_equal_bytes_and_no_text_escapes_its_place(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", lr=0.01)]
    names = name_runs(paths)
    assert names == ["a/run", "b/run"]

    def page() -> str:
        return render([read_run(p, n) for p, n in zip(paths, names, strict=True)], "/* plotly */")

    assert page() == page()
    assert page().count("</script>") == 3
    assert "cpu <1>" not in page()
    assert "<code>optim.lr</code>" in page()
    assert str(tmp_path) not in page()


@pytest.mark.parametrize("left", [[], ["events.jsonl"], ["metrics.jsonl"]])
def test_files_may_be_missing_or_empty(left: list[str], tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    for name in ("events.jsonl", "metrics.jsonl"):
        if name not in left:
            (path / name).write_text("") if left else (path / name).unlink()
    record = read_run(path, "run")
    assert "run" in render([record], "")
    assert "run" in render([record, record], "")


def test_the_first_life_of_a_decay_run_is_no_kill(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    events = (run / "events.jsonl").read_text().splitlines(keepends=True)
    first = next(line for line in events if '"resume"' in line)
    save = '{"event": "save", "step": 4}\n'
    decay = '{"event": "decay", "parent": {"step": 4}}\n'
    (run / "events.jsonl").write_text(decay + first)
    record = read_run(run, "run")
    assert (record.marks, record.goodput.restarts) == ([], 0)
    (run / "events.jsonl").write_text(decay + first + save + first)
    assert [mark["kind"] for mark in read_run(run, "run").marks] == ["kill"]


def test_rows_of_an_older_run_have_a_time_too(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    rows = [{"step": step, "loss_nats": 1.0, "step_ms": 500.0} for step in (2, 4)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["seconds"] for row in read_run(path, "run").steps] == [1.0, 2.0]


def test_a_long_run_is_thinned_out_but_for_its_spikes() -> None:
    rows = [{"step": step, "loss_nats": 2.0} for step in range(1, 100_001)]
    rows[54_321]["loss_nats"] = 50.0
    rows[77_777]["loss_nats"] = 0.5
    kept = thin(rows)
    assert len(kept) <= MOST_POINTS
    assert kept[-1]["step"] == 100_000
    assert {50.0, 0.5} <= {row["loss_nats"] for row in kept}


def test_a_write_that_fails_names_its_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="too large") as whole:
            write_output(page, 10_000 * "x")
        with pytest.raises(OSError, match="too large") as section:
            replace_section(page, "name", 10_000 * "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert whole.value.filename == section.value.filename == str(page)
    assert [file.name for file in tmp_path.iterdir()] == ["page.md"]
    assert page.read_text() == "before\n"


def test_without_plotly_the_message_says_what_to_install() -> None:
    packages = (matilda_train, matilda_model, matilda_optim)
    sources = [str(Path(package.__path__[0]).parent) for package in packages]
    if any((Path(source) / "plotly").exists() for source in sources):
        pytest.skip("plotly is installed beside the packages")
    program = "from matilda_train.report.page import plotly_source; plotly_source()"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sources)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pip install 'matilda-train[report]'" in done.stderr
