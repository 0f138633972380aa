"""The benchmark of time to a loss: its clock, its interpolation, schedules as peers wrote them."""

from __future__ import annotations

import fcntl
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
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
    training = importlib.import_module("time_to_loss_training")
    start, curve = training.our_clock(rows, lambda step: 100 * step)
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


NANOGPT_MODEL = """
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    dropout: float
    bias: bool
    n_layer: int
    n_head: int
    n_embd: int
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.logits = config, torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def configure_optimizers(self, weight_decay, lr, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=lr)
    def forward(self, ids, targets):
        logits = self.logits(ids)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""
NANOGPT_TRAIN = """
def get_lr(it):
    return min_lr if it == lr_decay_iters else learning_rate
"""


def test_a_peer_with_another_batch_takes_the_same_step_in_more_micro_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    peers = importlib.import_module("time_to_loss_peers")
    systems = importlib.import_module("time_to_loss_systems")
    (tmp_path / "nanoGPT").mkdir()
    (tmp_path / "nanoGPT" / "model.py").write_text(NANOGPT_MODEL)
    (tmp_path / "nanoGPT" / "train.py").write_text(NANOGPT_TRAIN)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    name, recipe = systems.parse_system("nanogpt@128x2.5")
    shape, cpu = peers.Shape(8, 16, quick=True), torch.device("cpu")
    peer = peers.PEERS[name](tmp_path, shape, cpu, recipe)
    assert (peer.tokens_per_step, peer.sequences, peer.micro_batch) == (128, 8, 4)
    ids, targets = torch.randint(8, (2, 8, 16), generator=torch.Generator().manual_seed(0))
    before = peer.model.logits.weight.detach().clone().requires_grad_()
    peer.start(10)
    peer.step(0, iter(zip(ids.split(4), targets.split(4), strict=True)))
    nn.functional.cross_entropy(before[ids].flatten(0, 1), targets.flatten()).backward()
    step = 2.5 * 6e-4 * before.grad  # shorter than 1.0: nothing is clipped
    assert torch.allclose(peer.model.logits.weight, before - step, atol=1e-7)
    peer.step(10, iter(zip(ids.split(4), targets.split(4), strict=True)))
    assert peer._optimizer.param_groups[0]["lr"] == pytest.approx(2.5 * 6e-5)

    assert systems.parse_system("nanochat") == ("nanochat", systems.Recipe())
    for wrong in ("nanogpt@", "nanogpt@128k", "nanogpt@0", "nanogpt@128x", "nanogpt@128x0"):
        with pytest.raises(ValueError, match="is no system; give nanogpt@TOKENS"):
            systems.parse_system(wrong)
    whole = peers.Shape(50304, 2048, quick=False)
    own, smaller = systems.Recipe(), systems.Recipe(131_072)
    assert peers.PEERS["nanogpt"].batch(whole, own)[:2] == (240, 16)
    assert peers.PEERS["nanogpt"].batch(whole, smaller)[:2] == (64, 16)
    assert peers.PEERS["nanochat"].batch(whole, own) == (256, 32, 1)
    assert peers.PEERS["nanochat"].batch(whole, smaller) == (64, 32, 0.25)
    for tokens in (1000, 36 * 2048):
        with pytest.raises(ValueError, match="does not divide into micro-batches"):
            peers.PEERS["nanogpt"].batch(whole, systems.Recipe(tokens))


def test_the_target_is_the_best_of_nanogpts_longest_runs_on_the_same_windows(
    benchmark: Any,
) -> None:
    def result(system: str, minutes: float, last: float, windows: str = "a") -> dict[str, Any]:
        curve = [{"seconds": 0.0, "tokens": 0, "val_loss_nats": 9.0}]
        curve += [{"seconds": 59.0 * minutes, "tokens": 10**6, "val_loss_nats": last}]
        known = {"held_out": windows, "training": "b"}
        environment: dict[str, Any] = {
            "device": "H",
            "torch": "2",
            "cuda": "13",
            "python": "3",
            "git_sha": "c",
        }
        environment["kernels"] = {"flash-attn-4": "4.0"}
        return {
            "system": system, "minutes": minutes, "curve": curve, "windows": known,
            "environment": environment, "seq_len": 8, "n_params": 10**6, "recipe": "as told",
            "tokens_per_step": 64, "steps": 9, "start_seconds": 1.0, "command": "it",
            "data_id": "d", "board": system,
        }  # fmt: skip

    runs = [result("nanogpt", 8, 4.5), result("nanogpt@64", 8, 4.0), result("nanogpt@64", 2, 3.9)]
    table = importlib.import_module("time_to_loss_table")
    text = table.describe([*runs, result("hero", 4, 4.0)])
    assert "nanoGPT (nanogpt@64) has after 7.87 minutes of training, 4.0000 nats" in text
    assert "| hero, 4 | 1.0M | 4,237 | 1.0M | 4.0000 | 3.93 | 50 % |" in text
    assert "| nanogpt, 8 | 1.0M | 2,119 | 1.0M | 4.5000 | – | – | – |" in text
    assert "From 3 boards" in text
    assert "- H, torch 2, flash-attn-4 4.0, CUDA 13" in text
    assert "NOT COMPARABLE" not in text
    text = table.describe([*runs, result("hero", 4, 4.0, windows="others")])
    assert "NOT COMPARABLE: these runs were not all measured on the same windows" in text


def test_a_config_with_schedules_of_its_own_is_trained_and_other_windows_are_refused(
    benchmark: Any, tmp_path: Path
) -> None:
    data = benchmark.quick_data(tmp_path)
    given = {"data_dir": data, "out": tmp_path / "out", "work": None, "evaluate_every": 100.0}
    ramps = ['train.batch_ramp=["3 steps: 256"]', 'train.seq_len_ramp=["0 steps: 16"]']
    momentum = ["optim.momentum_warmup_steps=300", "optim.momentum_cooldown_steps=20"]
    args = Namespace(**given, quick=True, set=[*momentum, *ramps], child="hero:0.01")
    args.out.mkdir()
    training = importlib.import_module("time_to_loss_training")
    found = training.run_ours("hero", 0.5, args)
    optim = found["config"]["optim"]
    assert optim["momentum_warmup_steps"] == min(300, found["steps"] // 2)
    assert optim["momentum_cooldown_steps"] == min(20, found["steps"] // 2)
    assert found["curve"][-1]["step"] == found["steps"]
    assert found["curve"][-1]["tokens"] == 3 * 128 + (found["steps"] - 3) * 256
    (args.out / "hero-0.01.json").write_text(json.dumps(found))
    args.set, args.child = ["data.seed=5"], "hero:0.02"
    with pytest.raises(SystemExit, match=r"hero:0\.02 would be trained on other windows than"):
        training.run_ours("hero", 0.5, args)
    args.set = ["train.seq_len=16"]
    with pytest.raises(SystemExit, match="would be measured on and trained on other windows"):
        training.run_ours("hero", 0.5, args)


def test_our_batch_and_rates_follow_the_systems_name(benchmark: Any) -> None:
    training = importlib.import_module("time_to_loss_training")
    args = Namespace(quick=True, set=["train.tokens_per_step=512", "optim.embedding_lr=0.25"])
    before, after, half = (
        training.our_config(name, args) for name in ("hero", "hero@256x0.5", "hero@64")
    )
    assert (before.train.tokens_per_step, before.train.micro_batch_size) == (512, 4)
    assert (after.train.tokens_per_step, after.train.micro_batch_size) == (256, 4)
    assert (half.train.tokens_per_step, half.train.micro_batch_size) == (64, 2)
    for name in ("lr", "adamw_lr", "embedding_lr"):
        assert getattr(after.optim, name) == 0.5 * getattr(before.optim, name)
        assert getattr(half.optim, name) == getattr(before.optim, name)
    assert training.our_config("hero@64", args, **{"optim.lr": 0.1}).optim.lr == 0.1


def test_what_a_system_lacks_is_said_before_another_trains(benchmark: Any, tmp_path: Path) -> None:
    given = {"data_dir": benchmark.quick_data(tmp_path), "quick": True, "peer_dir": tmp_path}
    args = Namespace(**given, set=[])
    benchmark.check("hero", args)
    for name, lack in {
        "frontier": "frontier.json",
        "nanogpt": "no checkout 'nanoGPT'",
        "nanogpt@100": "does not divide into micro-batches",
        "hero@100": "tokens_per_step",
        "hero@": "give hero@TOKENS or hero@TOKENSxFACTOR",
    }.items():
        with pytest.raises(SystemExit, match=lack):
            benchmark.check(name, args)
    args.set = ["optim.rate=1"]
    with pytest.raises(SystemExit, match=r"optim\.rate"):
        benchmark.check("hero", args)


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
import os, sys
from argparse import Namespace
from pathlib import Path
import time_to_loss
time_to_loss.__file__, time_to_loss.cuda = sys.argv[1], lambda: True
time_to_loss.check = lambda name, args: None  # there are neither data nor checkouts
args = Namespace(out=Path(sys.argv[2]), systems=sys.argv[3:] or ["hero:1"], data_dir=Path("data"))
args = Namespace(**vars(args), quick=False, gpus=max(1, len(sys.argv[3:])))
args = Namespace(**vars(args), evaluate_every=1, peer_dir=None, work=None, set=[])
args.stop_after = float(os.environ.get("STOP_AFTER", "inf"))
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
    assert done.stdout == "(['nanogpt:8'], [])\n", done.stderr
    assert {(tmp_path / f"on-{n}").read_text() for n in (0, 1)} == {"nanogpt:8", "hero:4"}
    assert (tmp_path / "hero-4.json").exists()
    late = subprocess.run(
        [*command, "nanogpt:8", "hero:3"],
        cwd=ROOT / "benchmarks", env=environment | {"STOP_AFTER": "300"}, capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    assert late.stdout == "([], ['nanogpt:8', 'hero:3'])\n", late.stderr


def test_stopped_it_takes_its_system_with_it_and_says_how_to_go_on(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "benchmarks/time_to_loss.py", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "runs").exists():  # made by the system, once it runs
        assert program.poll() is None
        time.sleep(0.01)
    program.terminate()
    _, told = program.communicate(timeout=100)
    assert program.returncode == 75
    assert told.splitlines()[-1] == "time_to_loss.py: stopped; run it again for what had not ended"
    assert "Traceback" not in told
    with (tmp_path / "hero-0.05.begun").open() as lock:  # the system's, which is gone
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
    assert again.stdout == "([], [])\n", again.stderr
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
        {"nanogpt", "nanogpt@256", "nanochat"} if peers else set()
    )
    for result in results:
        first, last = result["curve"][0], result["curve"][-1]
        assert first["seconds"] == 0
        assert last["step"] == result["steps"]
        assert last["val_loss_nats"] < first["val_loss_nats"] - 1
