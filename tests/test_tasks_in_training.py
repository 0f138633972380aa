"""Tasks and held-out loss by source inside a run: exact, resumable, and no part of training."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from killable_runs import TrainServer, state_sha256
from matilda_data import BinStream, documents_of, load_tokenizer, prepare_text
from matilda_train import load_config, load_run_model
from matilda_train.evals.encoding import DatasetCoder
from matilda_train.evals.scoring import ScoredTransformer
from matilda_train.evals.task_files import read_tasks
from matilda_train.evals.task_scores import plain_metrics, score_tasks
from matilda_train.metrics_log import MACHINE_FIELDS, read_rows

ITEMS = 9


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(2)
    words = ["the", "heart", "tree", "river", "light", "falls"]

    def text(n: int) -> str:
        return " ".join(draw.choice(words) for _ in range(n))

    choices = [
        {"context": text(3), "choices": [text(1), text(2), text(1)], "label": draw.randrange(3)}
        for _ in range(ITEMS)
    ]
    last_words = [{"context": text(2), "continuation": f" {text(1)}"} for _ in range(ITEMS)]
    for name, items in (("quiz_val", choices), ("last_test", last_words)):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def settings(task_dir: Path) -> list[str]:
    return [
        'eval.tasks=["quiz","last"]',
        f"eval.task_dir={task_dir}",
        "eval.tasks_every=4",
        "eval.task_limit=8",
    ]


@pytest.fixture(scope="module")
def scored_run(
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    settings: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    run_dir = tmp_path_factory.mktemp("scored") / "run"
    assert server.run(tiny_config, run_dir, corpus, set=settings) == 0, server.log.read_text()
    return run_dir


def untimed(run_dir: Path, *without: str) -> list[dict[str, Any]]:
    left_out = {*MACHINE_FIELDS, *without}
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows]


def scores_by_step(run_dir: Path) -> dict[int, Any]:
    rows = read_rows(run_dir / "metrics.jsonl")
    return {row["step"]: row["task_scores"] for row in rows if "task_scores" in row}


def test_a_run_that_scores_tasks_trains_to_the_same_bits(scored_run: Path, twin: Path) -> None:
    assert state_sha256(scored_run) == state_sha256(twin)
    assert list(scores_by_step(scored_run)) == [0, 4, 8, 12]
    twin_steps = {row["step"] for row in untimed(twin) if "val_loss_nats" in row}
    rows = untimed(scored_run, "task_scores")
    # Steps 4 and 8 have an evaluation for the tasks' sake; everything else is equal.
    same = [row for row in rows if "val_loss_nats" not in row or row["step"] in twin_steps]
    assert same == untimed(twin)


def test_the_scores_are_those_of_the_checkpoint(
    scored_run: Path, task_dir: Path, tiny_config: Path
) -> None:
    model, tokenizer = load_run_model(scored_run, device="cpu")
    tasks = read_tasks(task_dir, ["quiz", "last"], limit=8)
    expected = score_tasks(ScoredTransformer(model), DatasetCoder(tokenizer), tasks)
    written = scores_by_step(scored_run)[12]
    assert list(written) == ["quiz", "last"]
    for scores in expected:
        assert written[scores.name] == pytest.approx(plain_metrics(scores))
        assert written[scores.name]["items"] == 8


@pytest.mark.parametrize("fault", [{"at_step": 6}, {"at_evaluation": 2, "signal": "SIGTERM"}])
def test_killed_and_resumed_it_writes_the_same_rows(
    fault: dict[str, Any],
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    settings: list[str],
    scored_run: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, set=settings, **fault) in (-9, 75)
    assert server.run(tiny_config, run_dir, corpus, set=settings) == 0, server.log.read_text()
    assert state_sha256(run_dir) == state_sha256(scored_run)
    assert untimed(run_dir) == untimed(scored_run)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_score_what_one_does(
    parallel: str,
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    settings: list[str],
    scored_run: Path,
    tmp_path: Path,
) -> None:
    chosen = [*settings, f"train.parallel={parallel}", "train.micro_batch_size=2"]
    code = server.run(tiny_config, tmp_path / "run", corpus, ranks=2, set=chosen)
    assert code == 0, server.log.read_text()
    alone, together = scores_by_step(scored_run), scores_by_step(tmp_path / "run")
    assert alone.keys() == together.keys()
    for task, scores in alone[0].items():  # later, training itself rounds differently
        assert together[0][task] == pytest.approx(scores, rel=1e-5)
    by_source = [
        untimed(path)[0]["val_bits_per_byte_by_source"] for path in (scored_run, tmp_path / "run")
    ]
    assert by_source[1] == pytest.approx(by_source[0], rel=1e-5)


def test_bad_tasks_end_the_run_before_it_begins(
    server: TrainServer, tiny_config: Path, corpus: Path, task_dir: Path, tmp_path: Path
) -> None:
    wrong = ['eval.tasks=["quizz"]', f"eval.task_dir={task_dir}"]
    assert server.run(tiny_config, tmp_path / "run", corpus, set=wrong) == 2
    assert "it has last, quiz" in server.log.read_text()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"eval\.task_dir"):
        load_config(tiny_config, ['eval.tasks=["quiz"]'])
    with pytest.raises(ValueError, match=r"eval\.tasks_every"):
        load_config(tiny_config, ["eval.tasks_every=often"])


@pytest.fixture(scope="module")
def two_origins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of one source whose documents' records name two."""
    source = tmp_path_factory.mktemp("text") / "text.jsonl"
    draw = random.Random(0)
    with source.open("w") as file:
        for i in range(60):
            kind = "digits" if i % 3 else "letters"
            letters = "0123456789" if kind == "digits" else "abcdé fgh"
            text = "".join(draw.choice(letters) for _ in range(draw.randint(50, 200)))
            file.write(json.dumps({"text": text, "id": f"doc-{i}", "source": kind}) + "\n")
    out = tmp_path_factory.mktemp("data") / "set"
    prepare_text([source], out, tokenizer="byte", val_fraction=0.3, workers=1)
    return out


def test_held_out_loss_is_told_by_source(
    server: TrainServer, tiny_config: Path, two_origins: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    chosen = ["train.total_steps=2", "eval.tokens=1000", "optim.decay_fraction=0"]
    assert server.run(tiny_config, run_dir, two_origins, set=chosen) == 0, server.log.read_text()
    row = untimed(run_dir)[-1]
    model, _ = load_run_model(run_dir, device="cpu")
    stream = BinStream(two_origins, seq_len=32, seed=0, split="val", shuffle=False)
    token_bytes = load_tokenizer("byte").token_byte_lengths
    bits: dict[str, float] = defaultdict(float)
    n_bytes: dict[str, int] = defaultdict(int)
    windows = row["val_tokens"] // 32
    for number in range(windows):
        window = number * stream.n_windows // windows  # at even distances
        ids = torch.from_numpy(stream.windows(window, 1)[0].astype(np.int64))
        with torch.no_grad():
            logprobs = model(ids[None, :-1])[0].double().log_softmax(-1)
        for span in documents_of(stream, window):
            for place in range(max(span.first, 1), span.stop):
                bits[span.origin] -= float(logprobs[place - 1, ids[place]]) / math.log(2)
                n_bytes[span.origin] += int(token_bytes[ids[place]])
    expected = {origin: bits[origin] / n_bytes[origin] for origin in bits}
    assert set(expected) == {"digits", "letters"}
    assert row["val_bits_per_byte_by_source"] == pytest.approx(expected, rel=1e-5)
    whole = sum(bits.values()) / sum(n_bytes.values())
    assert row["val_bits_per_byte"] == pytest.approx(whole, rel=1e-5)
