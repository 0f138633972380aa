"""Saves in the background: frozen state, one at a time, no lost error, no late surprise."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from matilda_ckpt import Checkpointer, LockedError, NotFiniteError, RngState, SaveError
from matilda_ckpt.fs import OsFs, WriteFile


class GateFs(OsFs):
    """A disk that waits at the first file until the test opens the gate, or fails there."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.reached = threading.Event()
        self.error: OSError | None = None

    def create(self, path: str, size: int) -> WriteFile:
        self.reached.set()
        self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return super().create(path, size)


def test_state_is_frozen_at_the_call_whatever_training_does_next(tmp_path: Path) -> None:
    fs = GateFs()
    checkpoints = Checkpointer(tmp_path, fs=fs)
    weight = torch.arange(3_000_000, dtype=torch.float32)
    buffers = {
        "half": torch.ones(7, dtype=torch.float16),
        "strided": torch.arange(12).reshape(3, 4).t(),
        "array": np.arange(5),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0),
    }
    state = {"model": {"w": weight, "tied": weight}, "more": buffers, "count": {"n": 1}}
    handle = checkpoints.save(1, state, wait=False)
    fs.reached.wait(30)
    assert not handle.done
    assert not checkpoints.poll()
    weight.zero_()
    buffers["half"].zero_()
    buffers["strided"].zero_()
    buffers["array"][:] = 0
    state["count"]["n"] = 2
    fs.gate.set()
    assert handle.result().step == 1
    loaded = checkpoints.load_state(1)
    assert torch.equal(loaded["model"]["w"], torch.arange(3_000_000, dtype=torch.float32))
    assert loaded["model"]["w"].data_ptr() == loaded["model"]["tied"].data_ptr()
    assert torch.equal(loaded["more"]["half"], torch.ones(7, dtype=torch.float16))
    assert torch.equal(loaded["more"]["strided"], torch.arange(12).reshape(3, 4).t())
    assert loaded["more"]["array"].tolist() == [0, 1, 2, 3, 4]
    assert loaded["count"] == {"n": 1}


def test_files_are_the_same_bytes_as_those_of_a_waiting_save(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(300, 300) for _ in range(12)])
    rng = RngState()
    for folder, wait, defer in (("sync", 1, 0), ("async", 0, 0), ("deferred", 0, 1)):
        with Checkpointer(tmp_path / folder, shard_bytes=1 << 20) as checkpoints:
            state = {"model": model, "rng": rng}
            checkpoints.save(1, state, wait=bool(wait), defer_copy=bool(defer))
    left = tmp_path / "sync/step-00000001"
    names = sorted(p.name for p in left.iterdir())
    for right in (tmp_path / "async/step-00000001", tmp_path / "deferred/step-00000001"):
        assert names == sorted(p.name for p in right.iterdir())
        for name in names:
            if name not in ("MANIFEST.json", "COMMIT"):
                assert (left / name).read_bytes() == (right / name).read_bytes(), name


def test_next_save_waits_for_the_one_in_flight_and_memory_is_reused(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    weight = torch.zeros(9_000_000)  # more than a block
    for step in range(1, 5):
        weight.fill_(step)
        checkpoints.save(step, {"w": weight}, wait=False)
    checkpoints.finish()
    assert [info.step for info in checkpoints.list()] == [4, 3, 2]
    assert checkpoints.load_state(4)["w"].unique().tolist() == [4.0]
    assert checkpoints._pool is not None
    assert weight.nbytes <= checkpoints._pool.nbytes <= weight.nbytes + (32 << 20)


@pytest.mark.parametrize("defer", [False, True])
def test_memory_that_was_reserved_is_what_the_saves_take(tmp_path: Path, defer: bool) -> None:
    checkpoints = Checkpointer(tmp_path)
    state = {
        "model": torch.nn.Linear(500, 5000),
        "moments": [torch.ones(3, 3_000_000), torch.ones(7, dtype=torch.bfloat16)],
        "step": torch.tensor(3.0),
    }
    held = checkpoints.reserve(state)
    assert checkpoints._pool is not None
    blocks = list(checkpoints._pool._blocks[False])
    assert held == len(blocks) * (32 << 20) >= 46_000_000
    assert checkpoints.reserve(state) == held
    assert checkpoints.list() == []
    assert not list(tmp_path.iterdir())
    for step in (1, 2):
        handle = checkpoints.save(step, state, wait=False, defer_copy=defer)
        handle.result()
        assert all(a is b for a, b in zip(blocks, checkpoints._pool._blocks[False], strict=True))
    assert torch.equal(checkpoints.load_state(2)["moments"][0], torch.ones(3, 3_000_000))


@pytest.mark.parametrize("wait", [True, False])
def test_a_state_that_is_not_finite_is_refused_where_that_is_asked(
    tmp_path: Path, wait: bool
) -> None:
    checkpoints = Checkpointer(tmp_path)
    weight = torch.ones(100)
    checkpoints.save(1, {"w": weight}, nonfinite="refuse", wait=wait).result()
    weight[77] = float("inf")
    with pytest.raises(NotFiniteError, match=r"step 2 holds NaN or infinity and was not saved"):
        checkpoints.save(2, {"w": weight}, nonfinite="refuse", wait=wait).result()
    assert [info.step for info in checkpoints.list()] == [1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["step-00000001"]
    checkpoints.save(2, {"w": weight}, wait=wait).result()
    assert [(info.step, info.healthy) for info in checkpoints.list()] == [(2, False), (1, True)]


@pytest.mark.parametrize("how", ["save", "poll", "finish", "close", "result", "restore"])
def test_a_failure_reaches_the_next_call_exactly_once(tmp_path: Path, how: str) -> None:
    fs = GateFs()
    fs.gate.set()
    checkpoints = Checkpointer(tmp_path, fs=fs)
    checkpoints.save(1, {"x": torch.ones(2)})
    fs.error = OSError(errno.EIO, "injected")
    handle = checkpoints.save(2, {"x": torch.ones(2)}, wait=False)
    handle._ended.wait()
    fs.error = None
    calls = {
        "save": lambda: checkpoints.save(3, {"x": 1}, wait=False),
        "poll": checkpoints.poll,
        "finish": checkpoints.finish,
        "close": checkpoints.close,
        "result": handle.result,
        "restore": lambda: checkpoints.restore({}),
    }
    with pytest.raises(SaveError, match=r"step 2 was not saved.*injected.*untouched"):
        calls[how]()
    checkpoints.save(4, {"x": 1}, wait=False).result()
    assert [info.step for info in checkpoints.list()] == [4, 1]


def test_deadline_abandons_the_save_and_a_later_one_works(tmp_path: Path) -> None:
    fs = GateFs()
    checkpoints = Checkpointer(tmp_path, fs=fs)
    handle = checkpoints.save(1, {"x": torch.ones(2)}, wait=False)
    fs.reached.wait(30)
    with pytest.raises(SaveError, match="abandoned"):
        checkpoints.finish(deadline_s=0.01)
    fs.gate.set()
    handle._ended.wait()
    assert checkpoints.list() == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert checkpoints.poll()
    checkpoints.save(2, {"x": torch.ones(2)})
    checkpoints.save(3, {"x": torch.ones(2)}, wait=False)
    info = checkpoints.finish(deadline_s=30)
    assert info is not None
    assert info.step == 3
    assert checkpoints.finish() is None


def test_bad_arguments_and_a_foreign_lock_are_errors_of_the_call_itself(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    with pytest.raises(ValueError, match="pickle"):
        checkpoints.save(1, {"x": object()}, wait=False)
    checkpoints.save(1, {"x": 1}, wait=False)
    with pytest.raises(LockedError):
        Checkpointer(tmp_path).save(1, {"x": 1}, wait=False)
    checkpoints.close()


def test_non_finite_state_is_seen_in_the_background(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    bad = torch.ones(1000, dtype=torch.bfloat16)
    bad[-1] = float("nan")
    assert not checkpoints.save(1, {"x": bad}, wait=False).result().healthy
    assert checkpoints.save(2, {"x": bad[:-1]}, wait=False).result().healthy


def test_arrays_are_copied_where_torch_was_never_imported(tmp_path: Path) -> None:
    code = f"""
import sys, threading
import numpy as np
from matilda_ckpt import Checkpointer
c = Checkpointer({str(tmp_path)!r})
gate = threading.Event()
c._background.alive = gate.wait
array = np.arange(1000)
handle = c.save(1, {{"x": array}}, wait=False)
array[:] = 0
gate.set()
handle.result()
assert "torch" not in sys.modules
assert (c.load_state(1)["x"] == np.arange(1000)).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interpreter_exit_completes_the_save(tmp_path: Path) -> None:
    code = f"""
import numpy as np
from matilda_ckpt import Checkpointer
c = Checkpointer({str(tmp_path)!r}, shard_bytes=1 << 20)
c.save(1, {{"x": [np.full(300_000, i) for i in range(8)]}}, wait=False)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    restored = Checkpointer(tmp_path).restore({})
    assert restored is not None
    assert [int(t[0]) for t in restored.state["x"]] == list(range(8))


@pytest.mark.gpu
@pytest.mark.parametrize("defer", [False, True])
def test_cuda_state_is_frozen_and_training_goes_on(tmp_path: Path, defer: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    checkpoints = Checkpointer(tmp_path)
    weight = torch.randn(30_000_000, device="cuda")
    expected = weight.cpu()
    host = {"large": torch.ones(5000), "step": torch.tensor(3.0)}
    held = checkpoints.reserve({"w": weight, "t": {"same": weight}, "host": host})
    assert held >= weight.nbytes
    for step in (1, 2):
        state = {"w": weight, "t": {"same": weight}, "host": host}
        handle = checkpoints.save(step, state, wait=False, defer_copy=defer)
        weight.zero_()
        host["step"].zero_()
        torch.cuda.synchronize()
        handle.wait_copied()
        host["large"].zero_()
        loaded = checkpoints.load_state(handle.path)
        assert torch.equal(loaded["w"], expected)
        assert bool((loaded["host"]["large"] == 1).all())
        assert float(loaded["host"]["step"]) == 3.0
        weight.copy_(expected)
        host["step"].fill_(3.0)
        host["large"].fill_(1.0)
        assert checkpoints._pool is not None
        assert checkpoints._pool.nbytes == held


@pytest.mark.gpu
def test_waiting_save_waits_for_the_stream_of_its_caller(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight = torch.zeros(1_000_000, device="cuda")
    checkpoints = Checkpointer(tmp_path, threads=2)
    checkpoints.save(1, {"w": weight})
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(2_000_000_000)  # about a second of the device
        weight.fill_(2)
        checkpoints.save(2, {"w": weight})
    assert bool((checkpoints.load_state(2)["w"] == 2).all())


FORK = """
import os, signal, sys, threading
import torch
from matilda_ckpt import Checkpointer, SaveError
from matilda_ckpt.fs import OsFs

class GateFs(OsFs):
    reached, gate = threading.Event(), threading.Event()
    def create(self, path, size):
        self.reached.set()
        self.gate.wait(60)
        return super().create(path, size)

checkpoints = Checkpointer(sys.argv[1], fs=GateFs())
handle = checkpoints.save(1, {"w": torch.ones(1000)}, wait=False)
assert GateFs.reached.wait(30)
child = os.fork()
if child == 0:
    signal.alarm(20)  # a child that waits for ever is ended
    said = ""
    try:
        handle.result()
    except SaveError as error:
        said = str(error)
    assert checkpoints.poll()
    checkpoints.wait_copied()
    checkpoints.close()
    os._exit(0 if "forked" in said else 1)
ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
GateFs.gate.set()
checkpoints.close()
assert [info.step for info in checkpoints.list()] == [1]
checkpoints.save(2, {"w": torch.ones(1000)}, wait=True)  # the lock is still ours
sys.exit(ended)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_leaves_the_save_in_flight_to_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, str(tmp_path)]
    assert subprocess.run(command, timeout=120).returncode == 0
