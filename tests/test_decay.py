"""A checkpoint annealed in a run of its own is, in every bit, the run that decayed there itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from killable_runs import TrainServer, state_sha256
from matilda_ckpt import Checkpointer
from matilda_optim import Muon
from matilda_train import (
    RunConfig,
    RunDir,
    config_from_dict,
    config_to_dict,
    load_config,
    open_decay,
)
from matilda_train.decay import decay_config, decay_dir
from matilda_train.metrics_log import read_rows
from matilda_train.run_comparison import untimed_rows
from matilda_train.schedules import Schedules

ROOT = Path(__file__).resolve().parent.parent
LONG = ["train.total_steps=40", "optim.decay_fraction=0.25", "eval.every_steps=6"]
TOKENS = 6 * 256


@pytest.fixture(scope="module")
def parent(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of 40 steps in its stable phase, with checkpoints of steps 3, 6 and 7."""
    run_dir = tmp_path_factory.mktemp("parent") / "run"
    stop: dict[str, Any] = {"at_step": 7, "signal": "SIGTERM"}
    assert server.run(tiny_config, run_dir, corpus, set=LONG, **stop) == 75
    return run_dir


@pytest.fixture(scope="module")
def straight(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run whose config has the decay over steps 6 to 12 from the start."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    choice = [*LONG, "train.total_steps=12", "optim.decay_fraction=0.5"]
    assert server.run(tiny_config, run_dir, corpus, set=choice) == 0
    return run_dir


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def lr_factor(config: RunConfig, step: int) -> float:
    optimizer = Muon([torch.nn.Parameter(torch.zeros(16, 16))])
    return Schedules(config, optimizer).lr_factor(step)


def test_killed_again_and_again_it_ends_as_the_straight_run(
    server: TrainServer, corpus: Path, parent: Path, straight: Path, tmp_path: Path
) -> None:
    before = snapshot(parent)
    run_dir, config = tmp_path / "annealed", tmp_path / "config.json"
    faults: list[dict[str, Any]] = [
        {"at_step": 1},
        {"at_step": 3, "signal": "SIGTERM"},
        {"at_fsync": 4},
        {},
    ]
    for fault in faults:
        decay = open_decay(parent, from_step=6, tokens=TOKENS, run_dir=run_dir)
        config.write_text(json.dumps(config_to_dict(decay.config)))
        code = server.run(config, run_dir, corpus, **fault)
        assert code in (-9, 75) if fault else code == 0
    assert state_sha256(run_dir) == state_sha256(straight)
    assert untimed_rows(run_dir) == untimed_rows(straight)
    assert snapshot(parent) == before


def test_lineage_is_recorded_where_people_and_programs_look(parent: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "annealed"
    assert open_decay(parent, from_step=6, tokens=TOKENS, run_dir=run_dir).is_new
    assert not open_decay(parent, from_step=6, tokens=TOKENS, run_dir=run_dir).is_new
    origin = next(
        info
        for info in Checkpointer(parent / "checkpoints", read_only=True).list()
        if info.step == 6
    )
    run, described = RunDir.read(run_dir), RunDir.read(parent)
    assert run["run_id"] != described["run_id"]
    assert run["parent"] == {
        "run_id": described["run_id"],
        "run_dir": parent.name,
        "step": 6,
        "checkpoint": origin.name,
        "manifest_sha256": origin.manifest_sha256,
    }
    events = read_rows(run_dir / "events.jsonl")
    assert [(row["event"], row["parent"]) for row in events] == [("decay", run["parent"])]
    copy = Checkpointer(run_dir / "checkpoints", read_only=True).list()
    assert [info.manifest_sha256 for info in copy] == [origin.manifest_sha256]
    assert [p.name for p in tmp_path.iterdir()] == ["annealed"]


def test_the_schedule_falls_from_the_step_over_the_tokens(tiny_config: Path) -> None:
    config = load_config(tiny_config, LONG)
    for by in ("steps", "tokens"):
        parent = load_config(tiny_config, [*LONG, f"optim.schedule_by={by}"])
        child = decay_config(
            parent, from_step=20, tokens=1000, shape="1-sqrt", final_lr_fraction=0.2
        )
        # 1000 tokens are 4 steps of 256
        assert child.train.total_steps == 24
        factors = [lr_factor(child, step) for step in (19, 20, 21, 24)]
        assert factors == pytest.approx([1, 1, 1 - 0.8 * 0.5, 0.2])
    assert decay_config(config, from_step=30, tokens=1).train.total_steps == 31


def test_with_a_batch_ramp_the_decay_has_its_tokens(tiny_config: Path) -> None:
    ramp = [*LONG, 'train.batch_ramp=["10 steps: 512"]', "optim.schedule_by=tokens"]
    config = load_config(tiny_config, ramp)
    child = decay_config(config, from_step=8, tokens=2 * 256 + 3 * 512)
    assert child.train.total_steps == 13
    assert config_from_dict(config_to_dict(child)) == child
    assert lr_factor(child, 8) == 1.0
    assert lr_factor(child, 9) == pytest.approx(1 - 256 / 2048)


@pytest.mark.parametrize(
    ("overrides", "step", "said"),
    [
        ([], 31, "decays already; choose a checkpoint from step 30 or before"),
        ([], 1, "still warms up"),
        (["optim.schedule=cosine"], 9, "no stable phase"),
        (
            ["optim.schedule_by=tokens"],
            38,
            "decays already; choose a checkpoint from step 30 or before",
        ),
        (["optim.weight_decay_schedule=linear"], 9, "weight decay follows its whole length"),
    ],
)
def test_other_phases_are_refused(
    tiny_config: Path, overrides: list[str], step: int, said: str
) -> None:
    config = load_config(tiny_config, [*LONG, *overrides])
    with pytest.raises(ValueError, match=said) as raised:
        decay_config(config, from_step=step, tokens=100)
    assert "\n" not in str(raised.value)


def test_beside_a_parent_named_by_where_one_stands(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = parent.parent / "run-decay-6-100"
    monkeypatch.chdir(parent)
    assert decay_dir(Path(), from_step=6, tokens=100) == beside
    with pytest.raises(ValueError, match="it has: 3, 6, 7"):
        open_decay(".", from_step=5, tokens=100)
    monkeypatch.chdir(parent / "checkpoints")
    assert decay_dir(Path(".."), from_step=6, tokens=100) == beside
    assert open_decay("..", from_step=6, tokens=100).run_dir == beside
    assert json.loads((beside / "run.json").read_text())["parent"]["run_dir"] == "run"
    shutil.rmtree(beside)


def test_what_is_missing_damaged_or_taken_is_refused_and_leaves_nothing(
    parent: Path, straight: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="it has: 3, 6, 7"):
        open_decay(parent, from_step=5, tokens=100, run_dir=tmp_path / "a")
    with pytest.raises(ValueError, match="holds another run"):
        open_decay(parent, from_step=6, tokens=TOKENS, run_dir=straight)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds no run"):
        open_decay(parent, from_step=6, tokens=100, run_dir=tmp_path / "mine")
    broken = tmp_path / "broken"
    shutil.copytree(parent, broken)
    tensors = max((broken / "checkpoints" / "step-00000006").glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be used"):
        open_decay(broken, from_step=6, tokens=100, run_dir=tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "broken"}


def test_without_its_parents_checkpoint_it_does_not_begin_from_scratch(
    server: TrainServer, parent: Path, corpus: Path, tmp_path: Path
) -> None:
    decay = open_decay(parent, from_step=6, tokens=TOKENS, run_dir=tmp_path / "annealed")
    shutil.rmtree(decay.run_dir / "checkpoints")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_to_dict(decay.config)))
    assert server.run(config, decay.run_dir, corpus) == 4
    said = server.log.read_text()
    assert "The run had a checkpoint of step 6" in said
    assert "bring them back" in said
    assert len(read_rows(decay.run_dir / "metrics.jsonl")) > 0
    assert not (decay.run_dir / "metrics.discarded.jsonl").exists()


@pytest.mark.parametrize("at_fsync", [1, 2, 4, 6, 8, 10, 11])
def test_killed_while_it_is_made_the_directory_is_whole_or_not_there(
    at_fsync: int, parent: Path, tmp_path: Path
) -> None:
    run_dir, calls = tmp_path / "annealed", 0
    pid = os.fork()
    if pid == 0:
        fsync = os.fsync

        def die_at_last(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == at_fsync:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = die_at_last
        open_decay(parent, from_step=6, tokens=TOKENS, run_dir=run_dir)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert not run_dir.exists() or Checkpointer(run_dir / "checkpoints", read_only=True).list()
    decay = open_decay(parent, from_step=6, tokens=TOKENS, run_dir=run_dir)
    assert len(Checkpointer(decay.run_dir / "checkpoints", read_only=True).list()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["annealed"]


def test_the_directory_of_a_killed_attempt_is_swept(parent: Path, tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f".annealed.partial-{dead.pid}"
    left.mkdir()
    (left / "run.json").write_text("{")
    open_decay(parent, from_step=6, tokens=100, run_dir=tmp_path / "annealed")
    assert [path.name for path in tmp_path.iterdir()] == ["annealed"]


@pytest.mark.slow
def test_the_app_is_killed_and_resumed_by_the_same_command(
    parent: Path, straight: Path, corpus: Path
) -> None:
    command = [
        *(sys.executable, str(ROOT / "apps" / "decay.py"), "--run", str(parent)),
        *("--from-step", "6", "--tokens", str(TOKENS), "--data-dir", str(corpus)),
    ]
    run_dir = parent.with_name(f"{parent.name}-decay-6-{TOKENS}")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (run_dir / "run.json").is_file():
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert state_sha256(run_dir) == state_sha256(straight)
