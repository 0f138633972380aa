"""What a user gets wrong: one sentence with the fix, exit code 2, and a disk left as it was."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from killable_runs import TrainServer
from matilda_train.metrics_log import read_rows

ROOT = Path(__file__).resolve().parent.parent


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture
def world(tmp_path: Path, tiny_config: Path, corpus: Path, twin: Path) -> Path:
    """A folder with a config; the data set and a finished run are shared and read only."""
    (tmp_path / "tiny.json").write_text(tiny_config.read_text())
    return tmp_path


def refused(server: TrainServer, watched: list[Path], config: Path, **request: object) -> str:
    """Run, expect exit code 2 and an unchanged disk; returns what was said."""
    before = [snapshot(folder) for folder in watched]
    server.log.write_text("")
    run_dir = request.pop("run_dir")
    data_dir = request.pop("data_dir")
    assert server.run(config, run_dir, data_dir, **request) == 2, server.log.read_text()  # type: ignore[arg-type]
    assert [snapshot(folder) for folder in watched] == before
    said = [line for line in server.log.read_text().splitlines() if line]
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    return said[0]


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("optim.lrr=0.1", "Did you mean `optim.lr`?"),
        ("optim.lr=quick", "must be of type float"),
        ("train.device=cuda:77", "torch sees"),
        ("train.device=tpu", "must be auto, cpu, cuda or cuda:N"),
        ("train.device=meta", "must be auto, cpu, cuda or cuda:N"),
        ('data.mix=["half"]', "`data.mix`: 'half' is not NAME=WEIGHT"),
        ('data.mix=["text=0"]', "weights must be 0 or more, and one above 0"),
        ("train.micro_batch_size=3", "change `train.micro_batch_size`"),
        ("model.vocab_size=64", "raise it to at least that"),
        ("data.tokenizer=gpt2", "was made with the 'byte' tokenizer"),
        ("train.seq_len=4096", "at most `model.max_seq_len`"),
        (f"eval.sample_prompt={32 * 'x'}", "`eval.sample_prompt`: The prompt is 33 tokens long"),
    ],
)
def test_wrong_value(
    override: str, fix: str, server: TrainServer, world: Path, corpus: Path
) -> None:
    said = refused(
        server,
        [world, corpus],
        world / "tiny.json",
        run_dir=world / "run",
        data_dir=corpus,
        set=[override],
    )
    assert fix in said


def test_missing_config(server: TrainServer, world: Path, corpus: Path) -> None:
    said = refused(server, [world], world / "tinny.json", run_dir=world / "run", data_dir=corpus)
    assert "Did you mean" in said


def test_missing_data_set(server: TrainServer, world: Path) -> None:
    said = refused(
        server, [world], world / "tiny.json", run_dir=world / "run", data_dir=world / "no where"
    )
    assert "apps/prepare_text.py" in said
    assert f"--out-dir '{world / 'no where'}'" in said  # or a shell would read two words


def damage_flip(folder: Path) -> str:
    shard = max(folder.glob("*.bin"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[1024 + 100] ^= 1
    shard.write_bytes(content)
    return shard.name


def damage_truncate(folder: Path) -> str:
    shard = max(folder.glob("*.bin"), key=lambda p: p.stat().st_size)
    os.truncate(shard, shard.stat().st_size - 2)
    return shard.name


def damage_remove(folder: Path) -> str:
    shard = max(folder.glob("*.bin"), key=lambda p: p.stat().st_size)
    shard.unlink()
    return shard.name


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_remove])
def test_shard_corruption_is_detected_before_a_token_is_used(
    damage: Callable[[Path], str], server: TrainServer, world: Path, corpus: Path
) -> None:
    data = world / "data"
    shutil.copytree(corpus, data)
    name = damage(data)
    server.log.write_text("")
    code = server.run(world / "tiny.json", world / "run", data)
    said = server.log.read_text()
    assert code == 2, said
    assert name in said
    assert not [row for row in read_rows(world / "run" / "metrics.jsonl") if "loss_nats" in row]


def test_run_directory_of_another_config(
    server: TrainServer, world: Path, corpus: Path, twin: Path
) -> None:
    said = refused(
        server,
        [world, twin],
        world / "tiny.json",
        run_dir=twin,
        data_dir=corpus,
        set=["optim.lr=0.5"],
    )
    assert "`optim.lr`: 0.02 → 0.5" in said
    assert "--run-dir" in said


def test_folder_that_is_no_run_directory(server: TrainServer, world: Path, corpus: Path) -> None:
    (world / "photos").mkdir()
    (world / "photos" / "cat.png").write_bytes(b"x")
    said = refused(server, [world], world / "tiny.json", run_dir=world / "photos", data_dir=corpus)
    assert "holds no run" in said


@pytest.mark.parametrize(
    ("command", "fix"),
    [
        ("prepare_text.py --input {tmp}/none-*.txt --out-dir {tmp}/out", "none-"),
        ("prepare_text.py --input {tmp}/empty --out-dir {tmp}/out", "empty"),
        ("prepare_text.py --input {tmp}/bad.jsonl --out-dir {tmp}/out", "bad.jsonl"),
        ("prepare_smollm.py --mix 1/2/3 --out-dir {tmp}/out", "neither 83/17 nor 75/15/10 nor"),
        ("generate.py --run {tmp}/empty", "not a run directory"),
        ("generate.py --run {twin}/checkpoints/step-00000012", "lies in the run '{twin}'"),
        ("report.py {twin}x", "did you mean '{twin}'?"),
        ("report.py {twin} --out {tmp}/empty", "must be a file"),
        ("serve.py --run {twin} --port 99999", "choose another `--port`"),
        ("replay.py --run {twin} --step 5 --data-dir {tmp}/bad.jsonl", "bad.jsonl"),
        ("evaluate.py --checkpoint {tmp}/empty", "no `step-…` folder"),
        ("decay.py --run {twin} --from-step 6 --tokens 512 --set optim.lr=3", "`optim.lr`"),
        ("decay.py --run {twin} --from-step 6 --tokens 512 --data-dir {tmp}/no", "does not exist"),
        ("train.py --config {config} --preflight --dollars-per-hour nan", "`--dollars-per-hour`"),
        ("generate.py --run {twin} --seed 100000000000000000000", "`--seed`"),
        ("generate.py --run {twin} --prompt caf\udce9", "`--prompt` is not UTF-8 at character 3"),
        ("generate.py --run {twin} --tokens 0", "`--tokens` must be 1 or more, not 0"),
        ("generate.py --run {twin} --temperature -1", "`--temperature` must be"),
        ("generate.py --run {twin} --top-k 0", "`--top-k` must be"),
        ("generate.py --run {twin} --top-p 1.5", "`--top-p` must be"),
        ("verify_resume.py --config {config} --run-dir {tmp}/out --sigkills 10000000", "10^6"),
        ("ablate.py --config {config} --out {tmp}/out --variants mha --gpus 10000000", "to 1024"),
        ("ablate.py --config {config} --out {tmp}/out --variants mha --stop-after nan", "is nan"),
        ("ablate.py --config {config} --out {tmp}/out --variants mha --gpus 99", "torch sees"),
        (
            "ablate.py --config {config} --out {tmp}/out --variants mha --set train.device=cuda:77",
            "torch sees",
        ),
        (
            "ablate.py --config {config} --out {tmp}/out --variants mha --data-dir no",
            "'no' does not",
        ),
        ("generate.py --run {twin} --device cuda:77", "give `--device cpu`"),
        ("train.py --config {tmp}/empty", "is a folder, not a file"),
        ("train.py --config quickstart.json --run-dir {tmp}/out", "does not exist"),
        ("evaluate.py --run {twin} --task-dir {tmp}/no", "leave `--task-dir` out"),
        (
            "train.py --config {config} --set data.corpus=python-stdlib --data-dir {tmp}/tpyo "
            "--run-dir {tmp}/out",
            "tpyo' does not exist",
        ),
        (
            "verify_resume.py --config {config} --run-dir {tmp}/out --set train.device=cuda:77",
            "torch sees",
        ),
    ],
)
def test_app_says_one_sentence_and_exits_2(
    command: str, fix: str, server: TrainServer, tmp_path: Path, twin: Path, tiny_config: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "fine"}) + "\n{broken\n")
    before = snapshot(twin.parent)
    name, *args = command.format(tmp=tmp_path, twin=twin, config=tiny_config).split()
    done = server.run_program(ROOT / "apps" / name, args, tmp_path)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert fix.format(tmp=tmp_path, twin=twin) in lines[0]
    assert not list(tmp_path.glob("out/*.bin"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "plan.json").exists()
    assert snapshot(twin.parent) == before


def test_a_newer_checkpoint_that_is_passed_over_is_named_and_none_at_all_is_said(
    server: TrainServer, twin: Path, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(twin, run)
    newest = max((run / "checkpoints").glob("step-*"))
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    generate = [ROOT / "apps/generate.py", ["--run", str(run), "--tokens", "1"], tmp_path]
    done = server.run_program(*generate)
    assert done.returncode == 0, done.stderr
    assert f"the checkpoint of step {int(newest.name[5:])} is passed over" in done.stderr

    shutil.rmtree(run / "checkpoints")
    done = server.run_program(*generate)
    assert done.returncode == 4
    assert "holds no checkpoint any more; bring them back" in done.stderr
    again = ["--config", str(tiny_config), "--data-dir", str(corpus), "--run-dir", str(run)]
    done = server.run_program(ROOT / "apps/train.py", [*again, "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "already_finished"
    done = server.run_program(ROOT / "apps/train.py", again, tmp_path)
    assert "Its checkpoints are gone" in done.stdout


def test_run_of_another_version(server: TrainServer, world: Path, corpus: Path, twin: Path) -> None:
    shutil.copytree(twin, world / "run")
    file = world / "run" / "run.json"
    description = json.loads(file.read_text())
    description["config"]["optim"]["newest_trick"] = 3
    file.write_text(json.dumps(description))
    said = refused(server, [world], world / "tiny.json", run_dir=world / "run", data_dir=corpus)
    expected = "is of another version of matilda-train: Unknown config key `optim.newest_trick`"
    assert expected in said
    done = server.run_program(ROOT / "apps/generate.py", ["--run", str(world / "run")], world)
    assert done.returncode == 2
    assert expected in done.stderr


def test_second_process_in_one_run_directory_is_refused(
    server: TrainServer, world: Path, corpus: Path, twin: Path
) -> None:
    descriptor = os.open(twin / "run.lock", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        said = refused(server, [world, twin], world / "tiny.json", run_dir=twin, data_dir=corpus)
    finally:
        os.close(descriptor)
    assert "Another process is training" in said
