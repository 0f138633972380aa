"""Shared by the cross-package tests: a small corpus, a small config, a server of runs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from killable_runs import TrainServer
from matilda_data import prepare_text

TINY = {
    "model": {
        "vocab_size": 320,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "max_seq_len": 32,
        "mlp": "relu2",
        "mlp_ratio": 4.0,
        "logit_softcap": 30.0,
        "z_loss": 1e-4,
    },
    "optim": {"lr": 0.02, "adamw_lr": 0.005, "warmup_steps": 2},
    "data": {"tokenizer": "byte"},
    "train": {
        "total_steps": 12,
        "tokens_per_step": 256,
        "micro_batch_size": 4,
        "device": "cpu",
        "compile": False,
        "threads": 1,
        "max_consecutive_skips": 3,
    },
    "eval": {"every_steps": 5, "tokens": 256, "sample_tokens": 8},
    "ckpt": {"every_steps": 3},
    "log": {"every_steps": 1, "rms_every_steps": 4},
}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainServer]:
    server = TrainServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared byte-token data set of some 60 kB of made-up sentences."""
    words = ["the", "heart", "tree", "river", "light", "runs", "falls", "under", "and", "then"]
    draw = random.Random(0)
    source = tmp_path_factory.mktemp("text") / "text.jsonl"
    with source.open("w") as file:
        for i in range(120):
            text = " ".join(draw.choice(words) for _ in range(100))
            file.write(json.dumps({"text": text, "id": f"doc-{i}"}) + "\n")
    out = tmp_path_factory.mktemp("data") / "set"
    prepare_text([source], out, tokenizer="byte", val_fraction=0.1, workers=1)
    return out


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def twin(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run directory of an uninterrupted run of `tiny_config`."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    assert server.run(tiny_config, run_dir, corpus) == 0, server.log.read_text()
    return run_dir
