"""The benchmark of time to a loss: its clock, its interpolation, schedules as peers wrote them."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from matilda_train.data_source import SyntheticStream
from matilda_train.distributed import Ranks
from matilda_train.evaluation import evaluate

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import a_package_that_is_not_there
raise SystemExit("the script is never run")
def get_lr(it):
    # as somebody wrote it
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * it / lr_decay_iters)) * args.peak
def other():
    return 1
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("time_to_loss")


def test_a_loss_is_met_between_two_points_by_the_logarithm_of_the_time(benchmark: Any) -> None:
    curve = [{"seconds": s, "val_loss_nats": 8 - math.log(max(s, 1))} for s in (0, 10, 40, 160)]
    seconds_to = importlib.import_module("time_to_loss_table").seconds_to
    assert seconds_to(curve, 8 - math.log(20)) == pytest.approx(20)
    assert seconds_to(curve, 8 - math.log(160)) == pytest.approx(160)
    assert seconds_to(curve, 1.0) is None


def test_the_clock_counts_what_lies_between_steps_but_no_evaluation(benchmark: Any) -> None:
    def step(number: int, uptime: float) -> dict[str, float]:
        return {"step": number, "step_ms": 1000.0, "uptime_seconds": uptime}

    def evaluation(number: int, uptime: float, seconds: float) -> dict[str, float]:
        losses = {"val_loss_nats": 5.0, "val_bits_per_byte": 2.0}
        return {"step": number, "uptime_seconds": uptime, "eval_seconds": seconds} | losses

    rows = [
        evaluation(0, 30.0, 7.0),
        step(5, 45.0),  # the fifth second of training: what was before it began at 40
        evaluation(8, 51.0, 3.0),
        step(10, 53.5),  # half a second of something else
        evaluation(12, 56.0, 0.5),
    ]
    start, curve = benchmark.our_clock(rows, lambda step: 100 * step)
    assert start == 40.0
    assert [(p["seconds"], p["tokens"]) for p in curve] == [(0, 0), (8.0, 800), (12.5, 1200)]


def test_schedules_are_taken_from_the_script_without_running_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    peers = importlib.import_module("time_to_loss_peers")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    constants = {"min_lr": 0.1, "lr_decay_iters": 10, "args": Namespace(peak=2.0)}
    get_lr = peers.functions_of(script, ("get_lr",), constants)["get_lr"]
    assert [get_lr(it) for it in (0, 5, 10)] == pytest.approx([2.1, 1.1, 0.1])
    with pytest.raises(ValueError, match="no function get_momentum"):
        peers.functions_of(script, ("get_lr", "get_momentum"), constants)


def test_a_peer_is_evaluated_by_the_function_that_evaluates_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    peers = importlib.import_module("time_to_loss_peers")

    class Bigrams(peers.Peer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.model = nn.Embedding(8, 8)

        def start(self, steps: int) -> None: ...

        def step(self, number: int, micro_batches: Any) -> None: ...

        def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
            logits_BVT = self.model(ids).transpose(1, 2)
            return nn.functional.cross_entropy(logits_BVT, targets, reduction="none")

    peer, stream = Bigrams(), SyntheticStream(vocab_size=8, seq_len=16, seed=1)
    found = evaluate(
        peer.evaluated(),
        stream,
        max_tokens=64,
        seq_len=16,
        micro_batch_size=4,
        token_bytes=np.ones(8, dtype=np.int32),
        device=torch.device("cpu"),
        ranks=Ranks(),
    )
    windows = torch.from_numpy(stream.windows(0, 4).astype(np.int64))
    expected = peer.losses(windows[:, :-1], windows[:, 1:]).mean().item()
    assert found is not None
    assert found.val_loss_nats == pytest.approx(expected, rel=1e-6)


CHILD = """
import os, signal, sys, time
out, system = sys.argv[sys.argv.index("--out") + 1], sys.argv[sys.argv.index("--child") + 1]
assert system == "hero:1"
with open(f"{out}/pids", "a") as file:
    print(os.getpid(), file=file)
times = len(open(f"{out}/pids").readlines())
if times == 1:
    time.sleep(100)
with open(f"{out}/hero-1.json", "w") as file:
    file.write("{}")
"""
PARENT = """
import sys
from argparse import Namespace
from pathlib import Path
import time_to_loss
time_to_loss.__file__, time_to_loss.cuda = sys.argv[1], lambda: True
args = Namespace(out=Path(sys.argv[2]), systems=sys.argv[3:] or ["hero:1"], data_dir=Path("data"))
args = Namespace(**vars(args), quick=False, gpus=max(1, len(sys.argv[3:])))
args = Namespace(**vars(args), evaluate_every=1, peer_dir=None, work=None, set=[])
print(time_to_loss.run_all(args))
"""
MEETING = """
import os, sys, time
from pathlib import Path
out, system = sys.argv[sys.argv.index("--out") + 1], sys.argv[sys.argv.index("--child") + 1]
device = os.environ["CUDA_VISIBLE_DEVICES"]
Path(out, f"on-{device}").write_text(system)
while not all(Path(out, f"on-{number}").exists() for number in (0, 1)):
    time.sleep(0.01)
if system == "nanogpt:8":
    sys.exit(1)
Path(out, system.replace(":", "-") + ".json").write_text("{}")
"""


def test_systems_meet_each_on_a_gpu_of_its_own_and_one_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(MEETING)
    command = [sys.executable, "-c", PARENT, str(tmp_path / "child.py"), str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [*command, "nanogpt:8", "hero:4"],
        cwd=ROOT / "benchmarks", env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout == "['nanogpt:8']\n", done.stderr
    assert {(tmp_path / f"on-{n}").read_text() for n in (0, 1)} == {"nanogpt:8", "hero:4"}
    assert (tmp_path / "hero-4.json").exists()


def test_a_system_that_was_cut_off_is_run_again_and_never_beside_its_orphan(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, "-c", PARENT, str(tmp_path / "child.py"), str(tmp_path)]
    run: dict[str, Any] = {"cwd": ROOT / "benchmarks", "text": True, "capture_output": True}
    first = subprocess.Popen(command, cwd=ROOT / "benchmarks")
    pids = tmp_path / "pids"
    while not (pids.exists() and pids.read_text().endswith("\n")):
        assert first.poll() is None
    first.kill()
    first.wait()
    beside = subprocess.run(command, **run, check=False)
    assert beside.returncode != 0
    assert "a process still trains hero:1" in beside.stderr
    os.kill(int(pids.read_text()), signal.SIGKILL)
    again = subprocess.run(command, **run, check=False)
    while "still trains" in again.stderr:  # the orphan is still about to end
        again = subprocess.run(command, **run, check=False)
    assert again.stdout == "[]\n", again.stderr
    assert "hero:1 was begun and cut off: it is run anew" in again.stderr
    assert [path.name for path in tmp_path.glob("hero*")] == ["hero-1.json"]


@pytest.mark.slow
def test_the_quick_form_trains_every_system_there_is(tmp_path: Path) -> None:
    peers = os.environ.get("MATILDA_PEER_DIR")  # checkouts of nanoGPT and nanochat
    command = [sys.executable, str(ROOT / "benchmarks/time_to_loss.py"), "--quick", "--json"]
    command += [str(tmp_path / "all.json"), *(["--peer-dir", peers] if peers else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "all.json").read_text())
    assert {r["system"] for r in results} == {"hero"} | (
        {"nanogpt", "nanochat"} if peers else set()
    )
    for result in results:
        first, last = result["curve"][0], result["curve"][-1]
        assert first["seconds"] == 0
        assert last["step"] == result["steps"]
        assert last["val_loss_nats"] < first["val_loss_nats"] - 1
