"""A process that finds an earlier one's compiled artifacts beside the run compiles nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.compiler._cache import CacheInfo

from matilda_train.compile_cache import CompileCache

USE_CHAINS = """
import json, sys, torch
from pathlib import Path
from matilda_train.compile_cache import CompileCache

@torch.compile(dynamic=False)
def chain(x, length):  # products alone: no C++ to build
    y = x
    for _ in range(length):
        y = y @ x
    return y

cache = CompileCache(Path(sys.argv[1]), torch.device("cpu"))
loaded = cache.load()
for length in map(int, sys.argv[2:]):
    chain(torch.eye(4), length)
saved = cache.save()
print(json.dumps({"loaded": loaded, "saved": saved, "graphs": cache.account()}))
"""

ATTEND = """
import json, sys, torch
from pathlib import Path
from matilda_model.attention import causal_attention
from matilda_train.build import compile_model
from matilda_train.compile_cache import CompileCache

class Attend(torch.nn.Module):
    def forward(self, q, k, v):
        return causal_attention(q, k, v, "flash")  # in `sdpa_kernel`

cache = CompileCache(Path(sys.argv[1]), torch.device("cpu"))
loaded = cache.load()
before = torch._inductor.config.unsafe_marked_cacheable_functions
q, k, v = (torch.ones(1, 4, 1, 8, requires_grad=True) for _ in range(3))
compile_model(Attend())(q, k, v).sum().backward()
assert torch._inductor.config.unsafe_marked_cacheable_functions == before == {}
saved = cache.save()
print(json.dumps({"loaded": loaded, "saved": saved, "graphs": cache.account()}))
"""

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


def start(script: str, folder: Path, compiler_cache: Path, *arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), *arguments],
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
    first = start(TRAIN_TWO_STEPS, tmp_path / "run", tmp_path / "machine-1")
    assert (first["loaded"], first["saved"], first["again"]) == (False, True, False)
    assert first["unwritable"] is False
    assert first["graphs"] == {"traced": 1, "reused": 0, "compiled": 2, "kernels": 0}
    second = start(TRAIN_TWO_STEPS, tmp_path / "run", tmp_path / "machine-2")
    assert second["loaded"] is True
    assert second["graphs"] == {"traced": 0, "reused": 2, "compiled": 0, "kernels": 0}
    assert second["gradient"] == first["gradient"]


def test_a_process_that_stops_early_takes_nothing_from_those_after_it(tmp_path: Path) -> None:
    def chains(machine: str, *lengths: str) -> tuple[object, ...]:
        done = start(USE_CHAINS, tmp_path / "run", tmp_path / machine, *lengths)
        graphs = done["graphs"]
        assert isinstance(graphs, dict)
        return done["loaded"], done["saved"], graphs["reused"], graphs["compiled"]

    assert chains("one", "1", "2") == (False, True, 0, 2)
    assert chains("two", "1", "3") == (True, True, 1, 1)
    assert chains("three", "1", "2", "3") == (True, False, 3, 0)


def test_attention_by_a_chosen_kernel_is_not_traced_again(tmp_path: Path) -> None:
    first = start(ATTEND, tmp_path / "run", tmp_path / "machine")
    assert first["graphs"] == {"traced": 1, "reused": 0, "compiled": 2, "kernels": 0}
    second = start(ATTEND, tmp_path / "run", tmp_path / "machine")
    assert (second["loaded"], second["saved"]) == (True, False)
    assert second["graphs"] == {"traced": 0, "reused": 2, "compiled": 0, "kernels": 0}


class Compiler:
    """Stands for torch's: artifacts are words, of which a process has used those in `used`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used: set[str] = set()
        monkeypatch.setattr("torch.compiler.save_cache_artifacts", self._save)
        monkeypatch.setattr("torch.compiler.load_cache_artifacts", self._load)

    def process(self, folder: Path, *used: str) -> CompileCache:
        """A new one that has loaded the cache and used these."""
        cache = CompileCache(folder, torch.device("cpu"))
        cache.load()
        self.used = set(used)
        return cache

    def held(self, folder: Path) -> set[str]:
        """What the files in `folder` hold."""
        return {file.read_bytes()[32:].decode() for file in folder.glob("*.bin")}

    def _save(self) -> tuple[bytes, CacheInfo]:
        content = " ".join(sorted(self.used)).encode()
        return content, self._load(content)

    def _load(self, content: bytes) -> CacheInfo:
        info = CacheInfo()
        info.artifacts["inductor"] = content.decode().split()
        return info


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


def test_a_file_goes_when_another_holds_all_of_it(compiler: Compiler, tmp_path: Path) -> None:
    assert compiler.process(tmp_path, "a", "b").save()
    assert not compiler.process(tmp_path, "a").save()
    cache = compiler.process(tmp_path, "c")
    assert cache.save()
    assert compiler.held(tmp_path) == {"a b", "c"}
    compiler.used = {"a", "c"}  # nothing new
    assert not cache.save()
    compiler.used = {"a", "c", "d"}
    assert cache.save()
    assert compiler.held(tmp_path) == {"a b", "a c d"}
    assert compiler.process(tmp_path, "a", "b", "c", "d", "e").save()
    assert compiler.held(tmp_path) == {"a b c d e"}


def test_the_newest_files_are_kept(compiler: Compiler, tmp_path: Path) -> None:
    for age, name in zip(range(60, 0, -10), "abcdef", strict=True):
        assert compiler.process(tmp_path, name).save()
        for file in tmp_path.iterdir():
            if file.read_bytes()[32:] == name.encode():
                os.utime(file, (time.time() - age, time.time() - age))
    assert compiler.held(tmp_path) == {"c", "d", "e", "f"}


def test_a_file_that_was_removed_meanwhile_is_written_again(
    compiler: Compiler, tmp_path: Path
) -> None:
    cache = compiler.process(tmp_path, "a")
    assert cache.save()
    assert not cache.save()
    shutil.rmtree(tmp_path)
    assert cache.save()


def test_the_one_file_of_an_earlier_version_is_loaded(compiler: Compiler, tmp_path: Path) -> None:
    name = CompileCache(tmp_path, torch.device("cpu")).name
    (tmp_path / f"{name}.bin").write_bytes(hashlib.sha256(b"a b").digest() + b"a b")
    assert not compiler.process(tmp_path, "a").save()
    assert compiler.process(tmp_path, "a", "b", "c").save()
    assert compiler.held(tmp_path) == {"a b c"}


def test_a_damaged_file_is_passed_over(compiler: Compiler, tmp_path: Path) -> None:
    assert not CompileCache(tmp_path, torch.device("cpu")).load()
    assert compiler.process(tmp_path, "a").save()
    (whole,) = tmp_path.iterdir()
    content = whole.read_bytes()
    for damaged in (b"", content[:-1], content[:20], b"\0" * 32 + content[32:]):
        whole.write_bytes(damaged)
        assert not CompileCache(tmp_path, torch.device("cpu")).load()
    assert compiler.process(tmp_path, "b").save()
    assert CompileCache(tmp_path, torch.device("cpu")).load()
    assert compiler.process(tmp_path, "a").save()
    assert compiler.held(tmp_path) == {"a", "b"}


def test_a_run_that_does_not_compile_writes_nothing(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path / "compile-cache", torch.device("cpu"), enabled=False)
    assert not cache.save()
    assert not cache.load()
    assert list(tmp_path.iterdir()) == []


def test_each_kind_of_machine_has_its_own_files(tmp_path: Path) -> None:
    def name() -> str:
        return CompileCache(tmp_path, torch.device("cpu")).name

    here = name()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platform.machine", lambda: "another")
        assert name() != here
    assert name() == here
