"""A study over real runs: killed, stopped, gone on with, and by workers, it says the same."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from killable_runs import TrainServer
from matilda_train.metrics_log import read_rows

ROOT = Path(__file__).resolve().parent.parent
ROWS = ["no_qk_norm", "again:train.micro_batch_size=2"]
SHORT = ["train.total_steps=9", "eval.every_steps=3", "eval.sample_tokens=0"]


def arguments(config: Path, corpus: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--config", str(config), "--data-dir", str(corpus), "--out", str(out), "--seeds", "2"),
        *("--set", *SHORT, "--variants", *ROWS, "--json", *more),
    ]


def without_clocks(result: dict[str, Any]) -> dict[str, Any]:
    for row in result["rows"]:
        for run in row["runs"]:
            run["tokens_per_second"] = None
    return result


def without_seed(result: dict[str, Any], seed: int) -> dict[str, Any]:
    for row in result["rows"]:
        row["runs"] = [run for run in row["runs"] if run["seed"] != seed]
    return result


def test_a_report_trains_nothing_in_this_process_either(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    given = arguments(tiny_config, corpus, tmp_path / "out", "--in-process", "--report")
    reported = server.run_program(ROOT / "apps/ablate.py", given, tmp_path)
    assert reported.returncode == 75, reported.stderr
    assert not list(tmp_path.glob("out/**/run.json"))


def test_killed_and_stopped_it_goes_on_and_says_what_the_undisturbed_one_says(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    def study(out: Path, *more: str, **fault: Any) -> subprocess.CompletedProcess[str]:
        given = arguments(tiny_config, corpus, out, *more)
        return server.run_program(ROOT / "apps/ablate.py", given, tmp_path, **fault)

    disturbed = tmp_path / "disturbed"
    killed = study(disturbed, "--in-process", "--json", "kept.json", at_step=14)
    assert killed.returncode == -signal.SIGKILL
    kept = json.loads((tmp_path / "kept.json").read_text())  # of what had ended by then
    assert [(row["name"], len(row["runs"])) for row in kept["rows"]] == [
        ("baseline", 1),
        ("no_qk_norm", 0),
        ("again", 0),
    ]
    assert json.loads((disturbed / "ablation.json").read_text()) == kept
    first = disturbed / "runs" / "baseline" / "seed-0" / "metrics.jsonl"
    finished = first.read_bytes(), first.stat().st_mtime_ns
    stopped = study(disturbed, "--in-process", at_step=20, signal="SIGTERM")
    assert stopped.returncode == 75, stopped.stderr
    assert len(json.loads(stopped.stdout)["missing"]) == 3
    ended = study(disturbed, "--in-process", "--discard-checkpoints")
    assert ended.returncode == 0, ended.stderr
    assert (first.read_bytes(), first.stat().st_mtime_ns) == finished
    assert (first.parent / "checkpoints").is_dir()
    assert not (disturbed / "runs" / "again" / "seed-1" / "checkpoints").exists()

    page = tmp_path / "docs" / "ABLATIONS.md"
    quiet = study(tmp_path / "quiet", "--in-process", "--write", str(page), "--name", "loss parity")
    assert quiet.returncode == 0, quiet.stderr
    result = json.loads(quiet.stdout)
    assert without_clocks(json.loads(ended.stdout)) == without_clocks(result)

    rows = {row["name"]: row for row in result["rows"]}
    assert result["missing"] == []
    assert all(row["same_batches"] for row in rows.values())
    assert len(set(map(str, (run["batches"] for run in rows["baseline"]["runs"])))) == 2
    assert rows["no_qk_norm"]["n_params"] == rows["baseline"]["n_params"] - 2 * 2 * 16
    same = rows["again"]["comparison"]  # other micro-batches: equal but for rounding
    assert abs(same["difference"]) < 1e-3 < abs(rows["no_qk_norm"]["comparison"]["difference"])
    assert rows["again"]["steps_saved"]["at_step"] == 6 * 256
    text = page.read_text()
    assert "| no_qk_norm |" in text
    assert "`model.qk_norm=false`" in text
    assert result["provenance"]["data_id"][0][:12] in text
    assert "σ of the baseline" in text
    assert "](ablations-loss-parity.svg)" in text  # a blank would end the link
    assert (page.parent / "ablations-loss-parity.svg").read_text().endswith("</svg>\n")

    whole = tmp_path / "whole.json"  # a study of fewer rows and seeds loses none of its runs
    whole.write_text(ended.stdout)
    fewer = ("--variants", ROWS[0], "--seeds", "1", "--earlier", "whole.json", "--json", whole.name)
    less = study(tmp_path / "less", *fewer)
    assert less.returncode == 0, less.stderr
    kept = json.loads(whole.read_text())
    assert [(row["name"], len(row["runs"])) for row in kept["rows"]] == [
        ("baseline", 1),
        ("no_qk_norm", 1),
    ]
    assert [(row["name"], len(row["runs"])) for row in kept["other_rows"]] == [
        ("baseline", 1),
        ("no_qk_norm", 1),
        ("again", 2),
    ]
    more = study(tmp_path / "more", "--earlier", "whole.json")
    assert more.returncode == 0, more.stderr
    assert without_clocks(json.loads(more.stdout)) == without_clocks(result)
    assert not list((tmp_path / "more").glob("runs/*/*"))

    part = without_seed(json.loads(ended.stdout), 1)
    (tmp_path / "earlier.json").write_text(json.dumps(part))
    known = ("--earlier", "earlier.json", "--in-process")
    moved = study(tmp_path / "moved", *known)
    assert moved.returncode == 0, moved.stderr
    assert without_clocks(json.loads(moved.stdout)) == without_clocks(result)
    assert {path.name for path in (tmp_path / "moved").glob("runs/*/*")} == {"seed-1"}
    wrong = study(tmp_path / "wrong", *known, "--set", *SHORT, "optim.lr=0.01")
    assert wrong.returncode == 2
    assert "are of another config" in wrong.stderr
    part["provenance"]["data_id"] = ["of-another-corpus"]
    (tmp_path / "earlier.json").write_text(json.dumps(part))
    wrong = study(tmp_path / "wrong", *known)
    assert wrong.returncode == 2
    assert "read the data set of-another-corpus, but this is" in wrong.stderr
    (tmp_path / "earlier.json").write_text("{}")
    wrong = study(tmp_path / "wrong", *known)
    assert wrong.returncode == 2
    assert "holds no results of a study" in wrong.stderr
    assert not (tmp_path / "wrong" / "runs").exists()

    other = study(disturbed, "--set", "optim.lr=0.01")
    assert other.returncode == 2
    assert "holds a run of another config" in other.stderr


def test_a_diverged_run_is_a_result_and_a_grid_ranks_its_points(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    def grid(*more: str, **fault: Any) -> subprocess.CompletedProcess[str]:
        given = [
            *("--config", str(tiny_config), "--data-dir", str(corpus), "--out", "rates"),
            *("--seeds", "1", "--set", *SHORT, "train.max_consecutive_skips=1", "optim.lr=0.05"),
            *("--grid", "optim.lr=0.001,0.02,0.03", "--in-process", *more),
        ]
        return server.run_program(ROOT / "apps/ablate.py", given, tmp_path, **fault)

    done = grid("--write", "CALIBRATION.md", nan_at_steps=[20])
    assert done.returncode == 0, done.stderr
    assert "lr=0.03, seed 0: diverged" in done.stderr
    assert "Best: optim.lr=0.02" in done.stdout
    assert "One seed" in done.stdout
    page = (tmp_path / "CALIBRATION.md").read_text()
    assert page.index("`lr=0.02`") < page.index("`lr=0.001`") < page.index("`lr=0.03`")
    assert "| diverged |" in page
    ranked = json.loads(grid("--report", "--json").stdout)
    (tmp_path / "rates.json").write_text(json.dumps(ranked))
    again = grid("--earlier", "rates.json", "--out", "elsewhere", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rows"] == ranked["rows"]
    assert not (tmp_path / "elsewhere" / "runs").exists()
    wrong = grid("--earlier", "rates.json", "--out", "wrong", "--set", "optim.weight_decay=0.3")
    assert wrong.returncode == 2
    assert "are of another config" in wrong.stderr
    halved = grid("--halving", "2", "--earlier", "rates.json")
    assert halved.returncode == 2
    assert "holds the runs of one round" in halved.stderr
    halved = grid("--halving", "2", "--json")
    assert halved.returncode == 0, halved.stderr
    assert [row["name"] for row in json.loads(halved.stdout)["rows"]] == ["lr=0.03", "lr=0.02"]
    assert len(list((tmp_path / "rates" / "round-1" / "runs").iterdir())) == 3


def test_runs_that_take_turns_train_one_at_a_time(
    tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "apps/ablate.py"), "--jobs-per-gpu", "2", "--take-turns"]
    command += arguments(tiny_config, corpus, tmp_path / "out", "--set", "train.total_steps=30")
    done = subprocess.run([*command, "log.every_steps=1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [run for row in json.loads(done.stdout)["rows"] for run in row["runs"]]
    assert all(run["tokens_per_second"] for run in runs), "each trained alone"
    spans = []
    for metrics in (tmp_path / "out" / "runs").glob("*/*/metrics.jsonl"):
        start = next(
            e for e in read_rows(metrics.with_name("events.jsonl")) if "start" in e["event"]
        )
        zero = datetime.fromisoformat(start["time"]).timestamp() - sum(start["seconds"].values())
        steps = [row for row in read_rows(metrics) if row.get("batch_sha256")]
        spans.append([zero + steps[at]["uptime_seconds"] for at in (1, -1)])  # of steps 2 and 30
    assert len(spans) == 6
    assert all(one[1] < other[0] for one, other in itertools.pairwise(sorted(spans)))


def test_two_workers_find_one_corpus_that_neither_had_to_make_and_share_out_the_cores(
    tiny_config: Path, tmp_path: Path
) -> None:
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    count = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    threads = int(subprocess.run(count, capture_output=True, check=True, env=free).stdout)
    command = [sys.executable, str(ROOT / "apps/ablate.py"), "--config", str(tiny_config)]
    command += ["--out", "study", "--variants", "mha", "--seeds", "1", "--jobs-per-gpu", "2"]
    command += ["--set", *SHORT, "data.corpus=python-stdlib", "data.dir=library"]
    command += ["train.threads=null", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=free)
    assert done.returncode == 0, done.stderr
    assert "preparing python-stdlib in library" in done.stderr
    files = list((tmp_path / "study" / "runs").glob("*/*/run.json"))
    taken = [json.loads(file.read_text())["torch_threads"] for file in files]
    assert taken == [max(1, threads // 2)] * 2
    logs = [path.read_text() for path in (tmp_path / "study" / "logs").iterdir()]
    assert len(logs) == 2
    assert not any("preparing" in log for log in logs)
    assert [len(row["runs"]) for row in json.loads(done.stdout)["rows"]] == [1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_worker_compiles_every_row_on_a_gpu_and_measures_it(
    tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "apps/ablate.py"), "--gpus", "1", "--seeds", "1"]
    command += ["--config", str(tiny_config), "--data-dir", str(corpus), "--out", "study", "--json"]
    command += ["--set", *SHORT, "train.device=cuda", "train.compile=true", "model.max_seq_len=128"]
    command += ["model.d_model=128", "train.micro_batch_size=2"]
    command += ["--variants", "no_qk_norm,mha,adamw,swiglu,softcap_off,untied,residual_scalars"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert all(row["runs"][0]["tokens_per_second"] for row in rows)
    assert all(row["runs"][0]["peak_memory_gib"] for row in rows)
    log = (tmp_path / "study" / "logs" / "worker-0.log").read_text()
    assert "recompile_limit" not in log
    caches = (tmp_path / "study" / "runs").glob("*/seed-0/compile-cache/*.bin")
    sizes = [cache.stat().st_size for cache in caches]
    assert max(sizes) < 3 * min(sizes)  # each holds its own row's graphs, not all before it


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["study", "worker"])
def test_workers_whose_study_dies_save_and_a_dead_worker_is_replaced(
    victim: str, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, str(ROOT / "apps/ablate.py"), "--jobs-per-gpu", "2"),
        *arguments(tiny_config, corpus, tmp_path / "out"),
        *("--set", "train.total_steps=150", "ckpt.every_steps=150", "eval.every_steps=75"),
    ]
    pids = tmp_path / "pids"
    spy = (
        "import os, pathlib, sys\n"
        f"with open({str(pids)!r}, 'a') as file: file.write(f'{{os.getpid()}}\\n')\n"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\nif 'matilda_train.ablation.worker' in ' '.join(sys.orig_argv):\n"
        + "".join(f"    {line}\n" for line in spy.splitlines())
    )
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    study = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    runs = tmp_path / "out" / "runs"
    while sum(bool(read_rows(p)) for p in runs.glob("*/seed-0/metrics.jsonl")) < 2:
        assert study.poll() is None
        time.sleep(0.05)
    if victim == "study":
        study.kill()
        study.communicate()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        events = read_rows(runs / "baseline" / "seed-0" / "events.jsonl")
        assert [e["event"] for e in events if e["event"] in ("preempted", "resume", "finish")] == [
            "preempted",
            "resume",
            "finish",
        ]
        assert json.loads(done.stdout)["missing"] == []
    else:
        os.kill(int(pids.read_text().split()[0]), signal.SIGKILL)
        said, _ = study.communicate()
        assert study.returncode == 0
        assert json.loads(said)["missing"] == []
        assert "lost" in {row["outcome"] for row in read_rows(tmp_path / "out" / "jobs.jsonl")}
