"""The apps as a user calls them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from killable_runs import TrainServer
from matilda_data import verify
from matilda_train.metrics_log import read_rows

ROOT = Path(__file__).resolve().parent.parent
QUICK = (
    "train.total_steps=4 train.tokens_per_step=512 train.micro_batch_size=2 train.threads=1 "
    "optim.warmup_steps=1 eval.tokens=512 eval.sample_tokens=20 ckpt.every_steps=2 "
    "log.every_steps=1"
)


def app(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `apps/NAME.py …` in `cwd`, as `uv run` would."""
    name, *arguments = shlex.split(command)
    return subprocess.run(
        [sys.executable, str(ROOT / name), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def loaded_app(server: TrainServer, command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in a process that has torch already."""
    name, *arguments = shlex.split(command)
    return server.run_program(ROOT / name, arguments, cwd)


def test_dry_run_of_the_calibration_config_leaves_nothing_behind(
    server: TrainServer, tmp_path: Path
) -> None:
    done = loaded_app(
        server,
        f"apps/train.py --config {ROOT}/configs/calibration.json --dry-run --set "
        "model.d_model=128 model.n_layers=2 train.total_steps=20 train.device=cpu "
        "train.compile=false",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Dry run of 20 steps passed" in done.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_of_two_ranks_leaves_nothing_behind(tmp_path: Path) -> None:
    command = (
        f"-m torch.distributed.run --standalone --nproc-per-node 2 {ROOT}/apps/train.py "
        f"--config {ROOT}/configs/calibration.json --dry-run --set model.d_model=64 "
        "model.n_layers=1 model.vocab_size=512 model.n_heads=4 train.total_steps=2 "
        "train.device=cpu train.compile=false"
    )
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Dry run of 2 steps passed" in done.stdout
    assert not [path for path in tmp_path.rglob("*") if "matilda" in path.name]


def test_quickstart_trains_stops_resumes_finishes_and_generates(
    server: TrainServer, tmp_path: Path
) -> None:
    command = f"apps/train.py --config {ROOT}/configs/quickstart.json --set {QUICK}"
    run = tmp_path / "runs" / "quickstart"

    stopped = subprocess.Popen(
        [sys.executable, str(ROOT / "apps/train.py"), *shlex.split(command)[1:]],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not read_rows(run / "metrics.jsonl"):
        assert stopped.poll() is None, stopped.communicate()[1]
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    _, said = stopped.communicate()
    assert stopped.returncode == 75, said
    assert verify(tmp_path / "data" / "quickstart", deep=True).tokens > 1_000_000

    done = loaded_app(server, command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stderr
    assert "Held-out bits per byte" in done.stdout
    assert f"Run: {run.relative_to(tmp_path)}" in done.stdout
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if "loss_nats" in row]
    assert steps == [1, 2, 3, 4]

    again = loaded_app(server, command, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "This run is complete: 4 steps" in again.stdout
    assert "apps/generate.py" in again.stdout

    generate = "apps/generate.py --run runs/quickstart --prompt 'def ' --tokens 30"
    text = loaded_app(server, generate, tmp_path)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("def ")
    found = json.loads(loaded_app(server, f"{generate} --json", tmp_path).stdout)
    assert found["prompt"] + found["completion"] + "\n" == text.stdout
    assert found["step"] == 4


def test_the_next_command_takes_names_with_spaces(
    server: TrainServer, tiny_config: Path, tmp_path: Path
) -> None:
    texts = (json.dumps({"text": f"Line {i} of it."}) + "\n" for i in range(500))
    (tmp_path / "text.jsonl").write_text("".join(texts))
    prepare = "apps/prepare_text.py --input text.jsonl --out-dir 'my text' --tokenizer byte"
    said = app(f"{prepare} --val-fraction 0.2", tmp_path).stdout
    following = shlex.split(said.rpartition("Next: uv run ")[2])
    assert following[3:] == ["--data-dir", "my text", "--run-dir", "runs/my text"]
    train = shlex.join(["apps/train.py", "--config", str(tiny_config), *following[3:]])
    done = loaded_app(server, train, tmp_path)
    assert done.returncode == 0, done.stderr
    following = shlex.split(done.stdout.rpartition("Next: uv run ")[2])
    assert following == ["apps/generate.py", "--run", "runs/my text", "--prompt", "def "]


def test_prepare_text_writes_shards_that_verify_and_is_idempotent(tmp_path: Path) -> None:
    for part in ("a", "b"):
        with (tmp_path / f"part-{part}.jsonl").open("w") as file:
            for i in range(50):
                file.write(json.dumps({"text": f"Document {part}{i}. " * 20, "id": i}) + "\n")
    command = "apps/prepare_text.py --input 'part-*.jsonl' --out-dir out --tokenizer gpt2"
    done = app(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "data_id" in done.stdout
    assert verify(tmp_path / "out", deep=True).documents == 100
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.bin")}
    assert app(command, tmp_path).stdout == done.stdout
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.bin")}


@pytest.mark.parametrize(
    "name", ["train", "generate", "prepare_text", "report", "replay", "trace", "evaluate"]
)
def test_help_teaches_by_example(name: str, tmp_path: Path) -> None:
    done = app(f"apps/{name}.py --help", tmp_path)
    assert done.returncode == 0
    assert f"uv run apps/{name}.py" in done.stdout
