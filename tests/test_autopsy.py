"""A bad step leaves a bundle that names module and document; a step replays to the same bits."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train_server
from killable_runs import TrainServer
from matilda_data import BinStream, load_tokenizer, prepare_text
from matilda_train.metrics_log import read_rows
from matilda_train.replay import read_bundle, replay_step
from matilda_train.run_comparison import untimed_rows
from matilda_train.time_account import goodput
from matilda_train.trace import trace_step

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def marked_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents, of which one is full of the letter Z and no other has any."""
    draw = random.Random(1)
    source = tmp_path_factory.mktemp("text") / "text.jsonl"
    with source.open("w") as file:
        for i in range(40):
            words = ["ZZZZ"] if i == 17 else ["heart", "tree", "river", "light"]
            text = " ".join(draw.choice(words) for _ in range(500 if i == 17 else 100))
            file.write(json.dumps({"text": text, "id": f"doc-{i}"}) + "\n")
    out = tmp_path_factory.mktemp("data") / "set"
    prepare_text([source], out, tokenizer="byte", val_fraction=0.05, workers=1)
    return out


def test_autopsy_names_the_module_that_broke_and_the_document_in_the_batch(
    server: TrainServer, tiny_config: Path, marked_corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    token = int(load_tokenizer("byte").encode("Z")[0])
    code = server.run(
        tiny_config,
        run_dir,
        marked_corpus,
        nan_in_forward={"block": 1, "token": token},
        set=["train.max_consecutive_skips=99", "log.autopsies=2"],
    )
    assert code == 0, server.log.read_text()
    skipped = [r["step"] for r in untimed_rows(run_dir) if r.get("skipped")]
    bundles = sorted((run_dir / "autopsies").iterdir())
    assert len(skipped) >= 3
    assert goodput(run_dir).seconds["examining"] > 0
    assert [b.name for b in bundles] == [f"step-{step:08d}-nonfinite" for step in skipped[:2]]
    for bundle in bundles:
        report = read_bundle(bundle)
        assert report["rerun"]["outcome"] == "not finite again"
        assert report["rerun"]["first_module"] == "blocks.1.mlp"
        # The gradient flows back through the broken block to the very first parameter.
        assert report["rerun"]["first_parameter"] == "embed.weight"
        assert "blocks.0.attn.q.weight" in report["nonfinite_gradients"]
        assert report["weights"] == "before the update"
        tokens = np.load(bundle / "tokens.npy")
        row = report["rerun"]["sample"] - report["first_sample"]
        assert token in tokens[row]
        assert not (tokens[:row] == token).any()
        documents = read_rows(bundle / "documents.jsonl")
        mine = [d for d in documents if d["sample"] == report["rerun"]["sample"]]
        assert "doc-17" in [d["id"] for d in mine]
        assert [d["id"] for d in documents if "Z" in d["text"]].count("doc-17") == sum(
            "Z" in d["text"] for d in documents
        )
        assert set(json.loads((bundle / "rng.json").read_text())) >= {"python", "torch_cpu"}


def test_fault_that_no_rerun_repeats_is_called_one_of_the_machine(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    fault = {"rank": 0, "number": 7, "name": "blocks.0.mlp.up.weight"}
    assert server.run(tiny_config, run_dir, corpus, nan_in_backward=fault) == 0
    report = read_bundle(run_dir / "autopsies" / "step-00000004-nonfinite")
    assert report["rerun"]["outcome"].startswith("finite")
    assert report["nonfinite_gradients"] == ["blocks.0.mlp.up.weight"]


def test_step_replays_to_the_same_bits_and_a_difference_is_stated(
    twin: Path, corpus: Path, tmp_path: Path
) -> None:
    replay = replay_step(twin, 11)  # the run knows where its data lay
    assert replay.from_step == 9
    assert replay.expected is not None
    assert replay.differences == []
    other = tmp_path / "other"
    shutil.copytree(twin, other)
    rows = read_rows(other / "metrics.jsonl")
    for row in rows:
        if row["step"] == 11 and "loss_nats" in row:
            row["loss_nats"] *= 1 + 1e-7
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = json.loads((other / "run.json").read_text())
    run["config"]["eval"] |= {"tasks": ["quiz"], "task_dir": str(tmp_path / "gone")}
    (other / "run.json").write_text(json.dumps(run))  # a replay scores nothing
    differences = replay_step(other, 11, data_dir=corpus).differences
    assert len(differences) == 1
    assert "loss_nats" in differences[0]
    assert "relative difference 1.0e-07" in differences[0]
    with pytest.raises(ValueError, match="from 1 to 12"):
        replay_step(twin, 13, data_dir=corpus)


def test_bundle_of_a_spike_that_was_rolled_back_replays_to_the_same_bits(
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = tmp_path / "run"
    poison = [8 * 10, 8 * 11]
    choice = [
        "train.total_steps=14",
        "train.spike_policy=rollback",
        "train.spike_warmup_steps=10",
        "train.spike_threshold=1.6",
        "train.rollback_margin_steps=1",
    ]
    assert server.run(tiny_config, run_dir, corpus, set=choice, poisoned_samples=poison) == 0
    bundle = run_dir / "autopsies" / "step-00000011-spike"
    report = read_bundle(bundle)
    assert report["rerun"]["loss_nats"] >= report["rerun"]["median_loss_nats"]
    assert report["rerun"]["gradient_norm_ratio"]
    monkeypatch.setattr(BinStream, "windows", BinStream.windows)
    train_server.poison_samples(*poison)
    replay = replay_step(run_dir, 11, report=report, data_dir=corpus)
    assert replay.differences == []
    assert replay.row["skipped"]
    # The step of that number that is part of the run now is another one.
    assert replay_step(run_dir, 11, data_dir=corpus).row["loss_nats"] != report["loss_nats"]


def test_trace_accounts_for_every_token_and_agrees_with_the_metrics(
    twin: Path, corpus: Path
) -> None:
    trace = trace_step(twin, 5, data_dir=corpus)
    assert (trace.first_sample, trace.samples, trace.matches_metrics) == (32, 8, True)
    for sample in range(32, 40):
        spans = [(d["first"], d["stop"]) for d in trace.documents if d["sample"] == sample]
        assert [0, *(stop for _, stop in spans)] == [*(first for first, _ in spans), 33]
    with pytest.raises(ValueError, match="from 1 to 12"):
        trace_step(twin, 0, data_dir=corpus)


def test_trace_agrees_between_the_steps_that_are_logged(
    twin: Path, corpus: Path, tmp_path: Path
) -> None:
    sparse = tmp_path / "sparse"
    shutil.copytree(twin, sparse)
    metrics = sparse / "metrics.jsonl"
    rows = [row for row in read_rows(metrics) if row["step"] in (4, 8)]

    def agrees(step: int) -> bool | None:
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return trace_step(sparse, step, data_dir=corpus).matches_metrics

    assert [agrees(step) for step in (1, 4, 5, 6, 8)] == [True] * 5
    assert agrees(9) is None
    last = next(row for row in rows if row["step"] == 8 and "batch_sha256" in row)
    last["batch_sha256"] = "0" * 64
    assert [agrees(4), agrees(6)] == [True, False]


def test_trace_says_where_the_metrics_tell_of_another_batch(
    server: TrainServer, twin: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(twin, run_dir)
    file = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if row["step"] == 5 and "batch_sha256" in row:
            row["batch_sha256"] = row["batch_sha256"][::-1]
    kept = [row for row in rows if row["step"] < 9]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    found = {step: trace_step(run_dir, step, data_dir=corpus).matches_metrics for step in (4, 5, 6)}
    assert found == {4: True, 5: False, 6: False}  # each hash is that of all batches so far
    assert trace_step(run_dir, 10, data_dir=corpus).matches_metrics is None
    app = ROOT / "apps" / "trace.py"
    for step, code in ((4, 0), (5, 1), (10, 0)):
        options = ["--run", str(run_dir), "--step", str(step), "--data-dir", str(corpus)]
        assert server.run_program(app, options, tmp_path).returncode == code


def test_trace_with_other_data_is_refused(twin: Path, marked_corpus: Path) -> None:
    with pytest.raises(ValueError, match="point `--data-dir` at that one"):
        trace_step(twin, 5, data_dir=marked_corpus)


def test_a_run_finds_its_data_unless_they_moved(twin: Path, corpus: Path, tmp_path: Path) -> None:
    assert trace_step(twin, 5).matches_metrics
    moved = tmp_path / "moved"
    shutil.copytree(twin, moved)
    run = json.loads((moved / "run.json").read_text())
    run["config"]["data"]["dir"] = str(tmp_path / "gone")
    (moved / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="gone'; say with `--data-dir` where they lie now"):
        trace_step(moved, 5)
    assert trace_step(moved, 5, data_dir=corpus).matches_metrics


@pytest.mark.slow
def test_apps_print_the_documents_and_replay_a_step(
    twin: Path, corpus: Path, tmp_path: Path
) -> None:
    def app(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        given = ["--run", str(twin), "--data-dir", str(corpus), *arguments]
        return subprocess.run(
            [sys.executable, str(ROOT / "apps" / name), *given],
            capture_output=True,
            text=True,
            check=False,
        )

    traced = app("trace.py", "--step", "2", "--json")
    assert traced.returncode == 0, traced.stderr
    documents: list[dict[str, Any]] = json.loads(traced.stdout)["documents"]
    assert {d["sample"] for d in documents} == set(range(8, 16))
    replayed = app("replay.py", "--step", "2", "--into", str(tmp_path / "scratch"))
    assert replayed.returncode == 0, replayed.stderr
    assert "The same bits as in the run." in replayed.stdout
    assert (tmp_path / "scratch" / "metrics.jsonl").is_file()
