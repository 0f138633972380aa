"""Preparation from a hub that fails in every way, through the real `datasets` client."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SLOW = os.environ.get("MATILDA_SLOW") == "1"
HERE = Path(__file__).parent
# Workers of each preparation that is killed.
PLANS = [",".join([workers] * 34) for workers in "125"] if SLOW else ["1,2"]

README = """---
configs:
- config_name: web
  data_files:
  - split: train
    path: web/train-*
- config_name: code
  data_files:
  - split: train
    path: code/train-*
---
# A mixture
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None or importlib.util.find_spec("pyarrow") is None,
    reason="needs the `hub` and `parquet` extras",
)
@pytest.mark.timeout(3600 if SLOW else 280)
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"to_{plan[-1]}_workers")
def test_failing_hub_and_kills_never_change_the_data_set(
    tmp_path: Path, text_maker: Callable[[str, int], str], plan: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    repository = tmp_path / "root" / "org" / "mix"
    n_files, n_rows = (4, 60) if SLOW else (3, 40)
    for config in ("web", "code"):
        (repository / config).mkdir(parents=True)
        for number in range(n_files):
            rows = [
                {"text": text_maker(f"{config}{number}/{row}", 60 + row), "id": f"{number}-{row}"}
                for row in range(n_rows)
            ]
            parquet.write_table(
                pyarrow.Table.from_pylist(rows),
                repository / config / f"train-{number:05d}-of-{n_files:05d}.parquet",
                row_group_size=15,
            )
    (repository / "README.md").write_text(README)
    port = free_port()
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [
            *(sys.executable, str(HERE / "hub_driver.py"), str(tmp_path / "root")),
            *(str(tmp_path / "out"), str(port), plan, "20000"),
        ],
        env={
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for name in ("stormy", "killed", "restarted", "merged", "merged of one"):
        assert results[name] == results["calm"], name
    assert results["fetched to merge"] == 0
    assert results["kills"] == len(plan.split(","))
    assert results["server ran anew"]
    assert 20_000 < results["tokens"] < 30_000
    assert results["left over"] == ["manifest.json"]
    messages = results["messages"]
    assert "org/nothing" in messages["repository"]
    assert "no configuration 'books'; it has web, code" in messages["config"]
    assert "no split 'test'; it has train" in messages["split"]
    assert "failed" in messages["revision"]
    assert "training tokens asked for; lower `target_tokens`" in messages["tokens"]
    assert results["refused left"] is False


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the `hub` extra")
@pytest.mark.timeout(120)
def test_a_hub_that_the_environment_forbids_is_not_waited_for(tmp_path: Path) -> None:
    program = (
        "from matilda_data import HubSource, Retry, prepare_hub\n"
        "prepare_hub([HubSource(name='a', dataset='org/mix')], 'out', target_tokens=1000,"
        " retry=Retry(first_wait=0.01))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "DataError: looking up 'org/mix' on the hub failed" in last or "BelievedError" in last
    assert "`HF_HUB_OFFLINE`" in last
    assert not (tmp_path / "out").exists()
