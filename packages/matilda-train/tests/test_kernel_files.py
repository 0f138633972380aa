"""Kernels that another machine compiled lie in this one's caches, and nothing else is written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from matilda_train.kernel_files import KernelFiles

KERNEL = """
import json, sys
from pathlib import Path
import triton, triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from matilda_train.kernel_files import KernelFiles

@triton.jit
def fill(x, n: tl.constexpr):
    tl.store(x, n)

@triton.jit
def triton_poi_fused_of_inductors(x, n: tl.constexpr):
    tl.store(x, n)

heard = []
knobs.compilation.listener = lambda **kw: heard.append(kw["cache_hit"])
files = KernelFiles(Path(sys.argv[1]))
files.watch()
loaded = files.load()
for kernel in (fill, triton_poi_fused_of_inductors):
    source = ASTSource(kernel, {"x": "*fp32", "n": "constexpr"}, {(1,): 3})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
saved = files.save()
again = files.save()
files.close()
knobs.compilation.listener(cache_hit=None)  # the one from before
print(json.dumps({
    "loaded": loaded, "saved": saved, "again": again, "hits": heard, "compiled": files.compiled()
}))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_a_triton_kernel_of_another_machine_is_not_compiled_again(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL)
    archive = tmp_path / "run" / "x.kernels.zip"

    def machine(name: str) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, str(tmp_path / "kernel.py"), str(archive)],
            env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / name)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return result

    made_one = {"loaded": False, "saved": True, "hits": [False, False, None], "compiled": 1}
    assert machine("one") == made_one | {"again": False}
    with zipfile.ZipFile(archive) as held:
        kinds = sorted(Path(name).name for name in held.namelist())
    assert kinds == ["fill.cubin", "fill.json"]
    # inductor's own kernel travels with torch's artifacts, not here
    made_none = {"loaded": True, "saved": False, "hits": [True, False, None], "compiled": 0}
    assert machine("two") == made_none | {"again": False}


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a `quack` that stands for the real one, which runs on a GPU only."""
    package, cache = ModuleType("quack"), ModuleType("quack.cache")
    folder = tmp_path / "machine" / "quack_cache"
    cache.get_cache_path = lambda: folder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.cache", cache)
    return folder


def test_compiled_objects_travel_and_are_never_overwritten(compiler: Path, tmp_path: Path) -> None:
    archive = tmp_path / "run" / "x.kernels.zip"
    (compiler / "print").mkdir(parents=True)
    (compiler / "print" / "a.o").write_bytes(b"A" * 1000)
    (compiler / "print" / "a.lock").write_bytes(b"")
    assert KernelFiles(archive).save()
    with zipfile.ZipFile(archive) as held:
        assert held.namelist() == ["quack/print/a.o"]

    (compiler / "print" / "a.o").write_bytes(b"its own")
    elsewhere = KernelFiles(archive)
    assert elsewhere.load()
    assert (compiler / "print" / "a.o").read_bytes() == b"its own"
    (compiler / "print" / "a.o").unlink()
    assert elsewhere.load()
    assert (compiler / "print" / "a.o").read_bytes() == b"A" * 1000
    assert not elsewhere.save()  # nothing new

    (compiler / "print" / "a.o").unlink()
    assert elsewhere.compiled() == 0
    (compiler / "print" / "b.o").write_bytes(b"B")
    assert elsewhere.compiled() == 1
    assert elsewhere.save()
    with zipfile.ZipFile(archive) as held:
        assert held.namelist() == ["quack/print/a.o", "quack/print/b.o"]
    assert list(archive.parent.iterdir()) == [archive]


def test_a_cache_that_others_fill_does_not_swell_the_run(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matilda_train.kernel_files.MOST_BYTES", 2500)
    compiler.mkdir(parents=True)
    for age, name in enumerate(("new", "old", "older")):
        (compiler / f"{name}.o").write_bytes(b"x" * 1000)
        os.utime(compiler / f"{name}.o", (10_000 - age, 10_000 - age))
    archive = tmp_path / "x.kernels.zip"
    assert KernelFiles(archive).save()
    with zipfile.ZipFile(archive) as held:
        assert held.namelist() == ["quack/new.o", "quack/old.o"]


def test_a_damaged_archive_is_passed_over(compiler: Path, tmp_path: Path) -> None:
    compiler.mkdir(parents=True)
    content = os.urandom(100) + b"compiled" * 50
    (compiler / "a.o").write_bytes(content)
    archive = tmp_path / "x.kernels.zip"
    assert KernelFiles(archive).save()
    whole = archive.read_bytes()
    flipped = [
        whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))
    ]
    for damaged in [b"", whole[:10], whole[:-30], *flipped]:
        archive.write_bytes(damaged)
        (compiler / "a.o").unlink(missing_ok=True)
        files = KernelFiles(archive)
        files.load()
        placed = compiler / "a.o"
        assert not placed.exists() or placed.read_bytes() == content
        placed.write_bytes(content)
        files.save()
        again = KernelFiles(archive)
        assert again.load() or damaged in flipped
    archive.write_bytes(whole[:-30])
    files = KernelFiles(archive)
    assert not files.load()
    assert files.save()
    assert KernelFiles(archive).load()


def test_a_name_that_leads_out_of_the_cache_is_refused(compiler: Path, tmp_path: Path) -> None:
    archive = tmp_path / "x.kernels.zip"
    with zipfile.ZipFile(archive, "w") as held:
        held.writestr("quack/../../../outside.o", b"x")
    assert not KernelFiles(archive).load()
    assert not list(tmp_path.rglob("outside.o"))
    with zipfile.ZipFile(archive, "w") as held:
        held.writestr("unknown/a.o", b"x")  # of a later version: not ours to place
    assert KernelFiles(archive).load()
