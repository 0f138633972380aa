"""The report as a browser shows it: every plot drawn, nothing fetched, nothing complained of."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from headless_chromium import Page, find_chromium
from killable_runs import TrainServer
from matilda_train import write_report
from matilda_train.metrics_log import read_rows

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium at $CHROMIUM or on PATH"),
    pytest.mark.skipif(
        importlib.util.find_spec("plotly") is None, reason="needs `matilda-train[report]`: plotly"
    ),
]

# Of each plot: how many curves it was given, and how many it has put ink to.
PLOTS = """
[...document.querySelectorAll('.plot')].map(plot => {
  const traces = [...plot.querySelectorAll('.scatterlayer .trace, .barlayer .trace')];
  const inked = trace => [...trace.querySelectorAll('path')].some(path => path.getAttribute('d'));
  return [plot.dataset.chart, plot.data.length, traces.filter(inked).length];
})
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    with Page(CHROMIUM, tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module")
def killed(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run_dir = tmp_path_factory.mktemp("killed") / "killed"
    assert server.run(tiny_config, run_dir, corpus, at_step=6) == -9
    assert server.run(tiny_config, run_dir, corpus) == 0
    rows = read_rows(run_dir / "metrics.jsonl")
    for row in rows:
        if "val_loss_nats" in row:  # as if tasks had been asked of the model, too
            row["task_scores"] = {"piqa": {"acc": 0.5}, "arc_easy": {"acc": 0.3, "a<b": 1.5}}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def drawn(page: Page, file: Path) -> dict[str, int]:
    """Curves of each plot; all of them must be there, and nothing asked for but the file."""
    plots = page.evaluate(PLOTS)
    assert all(given == inked > 0 for _, given, inked in plots), plots
    assert page.errors == []
    assert set(page.requests) == {file.resolve().as_uri()}
    page.screenshot(file.with_suffix(".png"))
    return {name: given for name, given, _ in plots}


def test_one_run_in_light_and_dark(page: Page, killed: Path, tmp_path: Path) -> None:
    file = write_report([killed], tmp_path / "one.html")
    page.requests.clear()
    page.open(file, scheme="light")
    plots = drawn(page, file)
    assert {"loss", "bpb", "lr", "grad", "speed", "step", "update", "goodput"} <= plots.keys()
    assert plots["loss"] == 3  # raw, smoothed, and the kill
    assert plots["lr"] == 2
    titles = page.evaluate("[...document.querySelectorAll('.card h3')].map(h => h.innerText)")
    assert {"Tasks: accuracy", "Tasks: a<b"} <= set(titles)
    assert sorted(n for name, n in plots.items() if name.startswith("eval-")) == [1, 2]
    assert "goodput" in page.evaluate("document.querySelector('.tiles').innerText")
    ink = "getComputedStyle(document.body).color"
    light = page.evaluate(ink)
    page.set_scheme("dark")
    assert page.evaluate(ink) != light
    assert drawn(page, file) == plots


@pytest.mark.slow
def test_three_runs_overlaid_and_every_switch(
    page: Page, killed: Path, twin: Path, tmp_path: Path
) -> None:
    running = tmp_path / "running"
    shutil.copytree(killed, running)
    lines = (running / "metrics.jsonl").read_text().splitlines(keepends=True)
    (running / "metrics.jsonl").write_text("".join(lines[:8]) + lines[8][:20])
    file = write_report([twin, killed, running], tmp_path / "three.html")
    page.requests.clear()
    page.open(file, scheme="light")
    plots = drawn(page, file)
    assert plots["bpb"] == 3
    for button in ("[data-axis=tokens]", "[data-axis=seconds]", ".card button"):
        page.evaluate(f"document.querySelector('{button}').click()")
        assert drawn(page, file) == plots
    assert page.evaluate("document.getElementById('plot-loss').layout.yaxis.type") == "log"
    page.evaluate("document.querySelector('#runs button').click()")
    assert drawn(page, file)["bpb"] == 2


def test_a_run_that_has_not_begun(page: Page, killed: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(killed / "run.json", empty)
    file = write_report([empty], tmp_path / "empty.html")
    page.requests.clear()
    page.open(file, scheme="light")
    assert drawn(page, file) == {}
    assert "not started" in page.evaluate("document.body.innerText")


def write_run(folder: Path, like: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True)
    for name in ("run.json", "events.jsonl"):
        shutil.copy(like / name, folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_constant_stays_one_when_smoothed(page: Page, killed: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"step": step, "tokens": step, "gpu_temperature_celsius": 60.1} for step in range(1, 400)
    ]
    file = write_report([write_run(tmp_path / "even", killed, rows)], tmp_path / "even.html")
    page.open(file, scheme="light")
    smoothed = "document.getElementById('plot-temperature').data[1].y"
    assert page.evaluate(f"[...new Set({smoothed})]") == [60.1]
    ticks = "[...document.querySelectorAll('#plot-temperature .ytick')].map(t => t.textContent)"
    assert all(len(tick) < 8 for tick in page.evaluate(ticks))


def test_names_are_shown_as_they_are(page: Page, killed: Path, tmp_path: Path) -> None:
    names = ["<b>\"a\" & 'b'", "plain"]
    runs = [write_run(tmp_path / name, killed, [{"step": 1, "loss_nats": 2.5}]) for name in names]
    page.open(write_report(runs, tmp_path / "names.html"), scheme="light")
    for where in ("#runs button", "#plot-account .ytick"):
        shown = page.evaluate(f"[...document.querySelectorAll('{where}')].map(e => e.textContent)")
        assert sorted(shown) == names, where
    told = page.evaluate("document.getElementById('plot-loss').getAttribute('aria-label')")
    assert told == f"Training loss, nats per token, by step: {names[0]} 2.5; plain 2.5"


def test_more_rows_than_a_call_takes_arguments(page: Page, killed: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": step, "tokens": step} for step in range(4000)]
    runs = [write_run(tmp_path / f"{number}", killed, rows) for number in range(33)]
    page.open(write_report(runs, tmp_path / "many.html"), scheme="light")
    assert page.evaluate("document.querySelectorAll('#runs button').length") == 33
    assert page.errors == []


def test_nothing_is_cut_off_in_a_narrow_window(
    page: Page, killed: Path, twin: Path, tmp_path: Path
) -> None:
    file = write_report([killed, twin], tmp_path / "narrow.html")
    page.open(file, width=360, scheme="light")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
