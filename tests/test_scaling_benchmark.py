"""The benchmark of one node's GPUs: its quick form on two processes, and how it waits for a run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_a_run_that_has_ended_is_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scaling = importlib.import_module("scaling")
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    (tmp_path / "metrics.jsonl").write_text('{"step": 14}\n')
    scaling.wait_for_step(tmp_path, 14, ended)  # its last rows count
    with pytest.raises(RuntimeError, match="ended before step 15, exit code 0"):
        scaling.wait_for_step(tmp_path, 15, ended)


@pytest.mark.slow
def test_the_quick_form_loses_a_rank_and_sees_the_batches_of_the_undisturbed_run(
    tmp_path: Path,
) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/scaling.py"), "--quick"]
    command += ["--json", str(tmp_path / "all.json"), "--work-dir", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "all.json").read_text())
    assert [row["gpus"] for row in found["speed"]] == [2, 1]
    assert found["disturbed"]["equal_batches"]
    assert found["disturbed"]["all_steps"]
