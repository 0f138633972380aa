"""The stages that make the pages' figures anew are named, and run in their quick form."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "reproduce.sh"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a bash script")


def reproduce(*stages: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *stages],
        env=os.environ | {"PYTHON": sys.executable, "GPUS": "0"} | settings,
        capture_output=True,
        text=True,
    )


def test_its_help_names_every_stage_and_a_typo_is_answered(tmp_path: Path) -> None:
    shown = reproduce(RUNS=str(tmp_path), PAGES=str(tmp_path))
    assert shown.returncode == 2
    text = SCRIPT.read_text(encoding="utf-8")
    stages = re.search(r"^        ([a-z_ |]+)\) ;;$", text, re.MULTILINE)
    assert stages is not None
    for stage in stages[1].split(" | "):
        assert re.search(rf"^  {stage} +\w", shown.stdout, re.MULTILINE), stage
        assert f"\n{stage}() {{" in text
    wrong = reproduce("data", "tabel", RUNS=str(tmp_path / "runs"), PAGES=str(tmp_path / "pages"))
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("no stage 'tabel': data, table, ")
    assert list(tmp_path.iterdir()) == []


def test_the_peers_of_data_explain_themselves() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "data_peers.py")]
    helped = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    assert "{prepare,load,resume}" in helped.stdout
    assert subprocess.run(script, capture_output=True).returncode == 2


@pytest.mark.slow
def test_every_stage_in_its_quick_form(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "evals").mkdir(parents=True)
    choice = {"context": "def", "choices": ["f(x):", "import"], "label": 0}
    items = dict.fromkeys(("hellaswag", "arc_easy", "piqa", "sciq"), choice) | {
        "lambada_openai": {"context": "import sys, import", "continuation": " sys"},
        "winogrande": {"contexts": ["a = 1", "b = 1"], "continuation": " + a", "label": 0},
    }
    for task, item in items.items():
        (corpus / "evals" / f"{task}_val.jsonl").write_text(json.dumps(item) + "\n")
    runs, pages = tmp_path / "runs", tmp_path / "pages"
    done = reproduce(
        *("data", "table", "rates", "ablate", "options", "hero", "frontier", "evaluate", "minutes"),
        QUICK="1", GPUS="2", CORPUS=str(corpus), RUNS=str(runs), PAGES=str(pages),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for run in ("hero", "frontier"):
        events = (runs / run / "events.jsonl").read_text(encoding="utf-8")
        named = re.findall(r'"event": "(start|resume|finish)"', events)
        assert named == ["start", "resume", "finish"], "killed once, and resumed"
        assert (runs / run / "report.html").is_file()
    results = (pages / "RESULTS.md").read_text(encoding="utf-8")
    assert "winogrande" in results
    assert "## Speed of a training step" in results
    assert "mha" in (pages / "ABLATIONS.md").read_text(encoding="utf-8")
