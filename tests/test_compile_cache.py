"""A process that finds an earlier one's compiled artifacts beside the run compiles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from matilda_train.compile_cache import CompileCache

TRAIN_TWO_STEPS = """
import json, sys, torch
from pathlib import Path
from matilda_model import ModelConfig, Transformer
from matilda_train.build import compile_model
from matilda_train.compile_cache import CompileCache

torch.set_num_threads(1)
cache = CompileCache(Path(sys.argv[1]), torch.device("cpu"))
loaded = cache.load()
torch.manual_seed(0)
model = Transformer(ModelConfig(
    vocab_size=64, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=16, mlp="relu2"
))
compiled = compile_model(model)
ids = torch.arange(32).view(2, 16) % 64
compiled(ids, ids).loss.backward()
unwritable = CompileCache("/dev/null/folder", torch.device("cpu")).save()
saved = cache.save()
again = cache.save()
print(json.dumps({
    "loaded": loaded, "unwritable": unwritable, "saved": saved, "again": again,
    "graphs": cache.account(),
    "gradient": sum(float(p.grad.double().sum()) for p in model.parameters()),
}))
"""


def train(folder: Path, compiler_cache: Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_TWO_STEPS, str(folder)],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(compiler_cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.timeout(900)  # the C++ of every kernel is built twice
def test_another_machine_compiles_nothing_again(tmp_path: Path) -> None:
    first = train(tmp_path / "run", tmp_path / "machine-1")
    assert (first["loaded"], first["saved"], first["again"]) == (False, True, False)
    assert first["unwritable"] is False
    assert first["graphs"] == {"traced": 1, "reused": 0, "compiled": 2, "kernels": 0}
    second = train(tmp_path / "run", tmp_path / "machine-2")
    assert second["loaded"] is True
    assert second["graphs"] == {"traced": 0, "reused": 2, "compiled": 0, "kernels": 0}
    assert second["gradient"] == first["gradient"]


def test_a_damaged_or_missing_file_is_passed_over(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path, torch.device("cpu"))
    assert not cache.load()
    cache.path.write_bytes(b"\0" * 32 + b"not what was hashed")
    assert not cache.load()
    cache.path.write_bytes(b"")
    assert not cache.load()


def test_a_run_that_does_not_compile_writes_nothing(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path / "compile-cache", torch.device("cpu"), enabled=False)
    assert not cache.save()
    assert not cache.load()
    assert list(tmp_path.iterdir()) == []


def test_each_kind_of_machine_has_its_own_file(tmp_path: Path) -> None:
    def path() -> Path:
        return CompileCache(tmp_path, torch.device("cpu")).path

    here = path()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platform.machine", lambda: "another")
        assert path() != here
    assert path() == here
