"""Runs that one script or notebook makes one after another, and reads by their directory alone."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import TINY
from matilda_train import RunConfig, RunDir, config_from_dict, run_preflight, train
from matilda_train.trace import trace_step


def config(**fields: object) -> RunConfig:
    """The tiny config, three steps of it, with `section__field=value`."""
    raw = copy.deepcopy(TINY)
    for name, value in {"train__total_steps": 3, "eval__sample_tokens": 0, **fields}.items():
        section, _, field = name.partition("__")
        raw[section][field] = value  # type: ignore[index]
    return config_from_dict(raw)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


def test_a_run_leaves_torch_as_the_next_one_expects_it(tmp_path: Path, corpus: Path) -> None:
    torch.set_num_threads(2)
    strict = config(train__threads=1, train__deterministic=True)
    run_preflight(strict, run_dir=tmp_path / "run", data_dir=corpus, thorough=False)
    assert train(strict, run_dir=tmp_path / "run", data_dir=corpus).status == "finished"
    assert torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_data_given_as_data_are_found_though_the_config_names_others(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus, "data")
    train(config(data__dir="elsewhere"), run_dir="run", data_dir="data")
    assert RunDir.config("run").data.dir == "data"
    assert trace_step("run", 3).matches_metrics


def test_a_damaged_row_of_the_metrics_does_not_end_a_trace(tmp_path: Path, corpus: Path) -> None:
    train(config(), run_dir=tmp_path / "run", data_dir=corpus)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"batch_sha256": "cut off"}\n')
    assert trace_step(tmp_path / "run", 2).matches_metrics
