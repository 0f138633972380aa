"""The launch files: read by their own tools, and run with what a cluster's programs would do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from killable_runs import TrainServer
from matilda_train.metrics_log import read_rows

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ROOT / "launchers"
SCRIPTS = ["train.sh", "keep.sh", "slurm.sbatch", "vast.sh"]

# Stands for Python: notes how it was called, then waits for a signal or ends as it is told to.
INTERPRETER = """#!{python}
import json, os, signal, sys, time
if "--check" in sys.argv:
    if os.environ.get("WAIT") == "check":
        print("checking", flush=True)
        time.sleep(60)
    os._exit(int(os.environ.get("CHECK_ENDS_WITH", "0")))
code = int(os.environ["END_WITH"])
note = open(f"{folder}/task-{{os.environ.get('RANK', 'alone')}}", "a")
def end(number, frame):
    note.write(json.dumps({{"signal": signal.Signals(number).name}}) + "\\n")
    note.flush()
    os._exit(code)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, end)
names = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SRUN_CPUS_PER_TASK")
told = {{name: os.environ[name] for name in names if name in os.environ}}
note.write(json.dumps({{"arguments": sys.argv[1:], "told": told}}) + "\\n")
note.flush()
while os.environ.get("WAIT"):
    time.sleep(0.05)
os._exit(code)
"""

# Slurm's: a task each, USR1 handed on, TERM answered by killing, the highest exit code.
SRUN = """#!{python}
import os, signal, subprocess, sys
command = [a for a in sys.argv[1:]]
while command[0].startswith("-"):
    command.pop(0)
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(int(os.environ["SLURM_NTASKS"]))
]
def every(number):
    return lambda got, frame: [task.send_signal(number) for task in tasks]
signal.signal(signal.SIGUSR1, every(signal.SIGUSR1))
signal.signal(signal.SIGTERM, every(signal.SIGKILL))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf 'first\\nsecond\\n'; else echo "$@" >>{folder}/said-to-scontrol; fi
"""


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text.format(python=sys.executable, folder=folder))
    path.chmod(0o755)
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job of two tasks, with programs of its own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("python", INTERPRETER), ("srun", SRUN), ("scontrol", SCONTROL)):
        program(folder, name, text)
    return os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "python"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "8",
        "END_WITH": "0",
    }


def notes(cluster: dict[str, str], name: str) -> list[dict[str, object]]:
    file = Path(cluster["PYTHON"]).parent / name
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def launch(name: str, cluster: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(LAUNCHERS / name), *arguments],
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_notes(cluster: dict[str, str], *names: str) -> None:
    deadline = time.monotonic() + 60
    while not all(notes(cluster, name) for name in names):
        assert time.monotonic() < deadline, "the tasks never began"
        time.sleep(0.02)


def checker(name: str) -> str:
    """A checking program of the environment that runs the tests, or of PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"no {name} on PATH")
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_and_shellcheck_find_nothing(name: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCHERS / name)], check=True)
    command = [checker("shellcheck"), str(LAUNCHERS / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    command = [checker("hadolint"), str(LAUNCHERS / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_every_package_before_it_installs() -> None:
    text = (LAUNCHERS / "Dockerfile").read_text()
    for package in sorted((ROOT / "packages").iterdir()):
        assert f"COPY packages/{package.name}/pyproject.toml packages/{package.name}/\n" in text


@pytest.mark.parametrize("code", [0, 2, 4])
def test_slurm_ends_with_the_code_of_the_run(cluster: dict[str, str], code: int) -> None:
    cluster["END_WITH"] = str(code)
    job = launch("slurm.sbatch", cluster, "--config", "a b.json")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == code, said
    for rank in range(2):
        (called,) = notes(cluster, f"task-{rank}")
        arguments = ["apps/train.py", "--grace-seconds", "100", "--config", "a b.json"]
        assert called["arguments"] == arguments
        assert called["told"] == {
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "first",
            "MASTER_PORT": str(20000 + 4711),
            "SRUN_CPUS_PER_TASK": "8",
        }
    assert not (Path(cluster["PYTHON"]).parent / "said-to-scontrol").exists()


@pytest.mark.parametrize("code", [75, 5])
def test_slurm_requeues_a_run_that_should_go_on(cluster: dict[str, str], code: int) -> None:
    cluster["END_WITH"] = str(code)
    job = launch("slurm.sbatch", cluster)
    job.communicate(timeout=60)
    assert job.returncode == code
    assert (Path(cluster["PYTHON"]).parent / "said-to-scontrol").read_text() == "requeue 4711\n"


def test_slurms_notice_reaches_python_as_a_request(cluster: dict[str, str]) -> None:
    cluster |= {"END_WITH": "75", "WAIT": "1"}
    job = launch("slurm.sbatch", cluster)
    wait_for_notes(cluster, "task-0", "task-1")
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 75, said
    for rank in range(2):
        assert notes(cluster, f"task-{rank}")[1:] == [{"signal": "SIGUSR1"}]
    assert (Path(cluster["PYTHON"]).parent / "said-to-scontrol").read_text() == "requeue 4711\n"


def test_one_gpu_becomes_the_app_itself(cluster: dict[str, str]) -> None:
    cluster |= {"END_WITH": "75", "WAIT": "1", "GPUS": "1"}
    run = launch("train.sh", cluster, "--config", "a b.json")
    wait_for_notes(cluster, "task-alone")
    run.send_signal(signal.SIGTERM)  # to the shell's own process: nothing stands between
    run.communicate(timeout=60)
    assert run.returncode == 75
    called, signalled = notes(cluster, "task-alone")
    assert called["arguments"] == ["apps/train.py", "--config", "a b.json"]
    assert signalled == {"signal": "SIGTERM"}


@pytest.mark.parametrize(
    ("visible", "started"), [("0,2,5", "3"), ("GPU-8932,MIG-1f2e", "2"), ("3", None), ("", None)]
)
def test_as_many_processes_as_gpus_that_may_be_seen(
    visible: str, started: str | None, cluster: dict[str, str]
) -> None:
    program(Path(cluster["PYTHON"]).parent, "nvidia-smi", "#!/bin/sh\nseq 8\n")
    run = launch("train.sh", cluster | {"CUDA_VISIBLE_DEVICES": visible})
    run.communicate(timeout=60)
    assert run.returncode == 0
    (called,) = notes(cluster, "task-alone")
    arguments = called["arguments"]
    assert isinstance(arguments, list)
    if started is None:
        assert arguments == ["apps/train.py"]
    else:
        assert arguments[arguments.index("--nproc-per-node") + 1] == started


def test_a_torchrun_that_was_signalled_ends_with_75(cluster: dict[str, str]) -> None:
    cluster |= {"END_WITH": "1", "WAIT": "1", "GPUS": "2", "NNODES": "2", "HEAD": "first:29500"}
    run = launch("train.sh", cluster)
    wait_for_notes(cluster, "task-alone")
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 75
    called, signalled = notes(cluster, "task-alone")
    assert signalled == {"signal": "SIGTERM"}
    arguments = called["arguments"]
    assert isinstance(arguments, list)
    assert arguments[:4] == ["-m", "torch.distributed.run", "--nnodes", "2"]
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "first:29500"


def test_a_torchrun_that_failed_by_itself_keeps_its_code(cluster: dict[str, str]) -> None:
    run = launch("train.sh", cluster | {"END_WITH": "1", "GPUS": "2"})
    run.communicate(timeout=60)
    assert run.returncode == 1


def test_a_number_of_gpus_that_is_none_is_named(cluster: dict[str, str]) -> None:
    run = launch("train.sh", cluster | {"GPUS": "two"})
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "GPUS is 'two'" in said


def test_bad_input_ends_with_2_before_torchrun_starts(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    run = launch("train.sh", cluster | {"CHECK_ENDS_WITH": "2", "GPUS": "2"})
    run.communicate(timeout=60)
    assert run.returncode == 2
    assert not notes(cluster, "task-alone")
    real = cluster | {"PYTHON": sys.executable, "GPUS": "2"}
    for arguments, said in (
        (["--config", "configs/quickstrat.json"], "quickstart.json"),
        (["--config", "configs/base_124m.json", "--data-dir", f"{tmp_path}/none"], "none"),
    ):
        run = launch("train.sh", real, *arguments)
        lines = run.communicate(timeout=60)[0].splitlines()
        assert run.returncode == 2
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert said in lines[0]


def test_a_signal_while_the_input_is_checked_ends_with_75(cluster: dict[str, str]) -> None:
    run = launch("train.sh", cluster | {"WAIT": "check", "GPUS": "2"})
    assert run.stdout is not None
    assert run.stdout.readline() == "checking\n"
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 75
    assert not notes(cluster, "task-alone")


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_train_sh_stops_and_goes_on_with_a_real_torchrun(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path, nodes: int
) -> None:
    longer = ["train.total_steps=150", "ckpt.every_steps=10", "eval.every_steps=1000"]
    assert server.run(tiny_config, tmp_path / "twin", corpus, set=longer) == 0
    run_dir = tmp_path / "run"
    environment = os.environ | {
        "PYTHON": sys.executable,
        "GPUS": str(2 // nodes),
        "NNODES": str(nodes),
        "HEAD": "127.0.0.1:29571",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    arguments = ["--config", str(tiny_config), "--data-dir", str(corpus)]
    arguments += ["--run-dir", str(run_dir), "--set", *longer]

    def start() -> list[subprocess.Popen[str]]:
        return [launch("train.sh", environment, *arguments) for _ in range(nodes)]

    machines = start()
    while not list(run_dir.glob("checkpoints/step-*")):
        ended = [machine for machine in machines if machine.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        time.sleep(0.01)
    for machine in machines:
        machine.send_signal(signal.SIGTERM)
    said = [machine.communicate(timeout=100)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [75] * nodes, said
    machines = start()
    said = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0] * nodes, said
    events = [row["event"] for row in read_rows(run_dir / "events.jsonl")]
    kept = [event for event in events if event not in ("save", "spike")]
    assert kept == ["start", "preempted", "resume", "finish"]
    one, two = (
        {r["step"]: r["batch_sha256"] for r in read_rows(at / "metrics.jsonl") if "loss_nats" in r}
        for at in (tmp_path / "twin", run_dir)
    )
    assert two == one


def test_vast_asks_their_client_and_sends_this_checkout(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    call = '#!/bin/sh\nprintf "%s " {name} "$@" | tr "\\n" " " >>{calls}; echo >>{calls}\n'
    for name, rest in (("vastai", "echo ssh://root@host:22"), ("ssh", "cat >/dev/null")):
        path = tmp_path / name
        path.write_text(call.format(name=name, calls=calls) + rest + "\n")
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def vast(*arguments: str) -> str:
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(LAUNCHERS / "vast.sh"), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return calls.read_text()

    assert "search offers" in vast("offers")
    assert "create instance 12 " in vast("rent", "12")
    assert "--bid_price 1.5" in vast("rent", "12", "1.5")
    sent = vast("train", "12", "--config", "configs/quickstart.json")
    assert sent.count("ssh -o") == 4
    assert "tar -x -C /root/matilda" in sent
    assert "launchers/vast.sh rent" in subprocess.check_output(
        ["bash", str(LAUNCHERS / "vast.sh"), "--help"], text=True
    )


WORK = """
import os, signal, sys, time
def end(number, frame):
    open(sys.argv[1] + "/last", "w").write(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
os.makedirs(sys.argv[1] + "/checkpoints/.tmp-step-2", exist_ok=True)
open(sys.argv[1] + "/checkpoints/.tmp-step-2/half", "w").write("x")
open(sys.argv[1] + "/log", "a").write("life ")
time.sleep(60)
"""


@pytest.mark.skipif(shutil.which("rsync") is None, reason="no rsync on PATH")
def test_a_kept_folder_is_sent_while_it_grows_and_fetched_on_the_next_machine(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "bucket" / "run"
    for life in (1, 2):
        folder = tmp_path / f"machine-{life}"
        work = [sys.executable, "-c", WORK, str(folder)]
        command = ["bash", str(LAUNCHERS / "keep.sh"), str(folder), str(kept), *work]
        keeper = subprocess.Popen(command, env=os.environ | {"SECONDS_BETWEEN": "0"})
        deadline = time.monotonic() + 60
        while not (kept / "log").exists() or (kept / "log").read_text() != "life " * life:
            assert time.monotonic() < deadline, "nothing was sent"
            time.sleep(0.02)
        keeper.send_signal(signal.SIGTERM)
        assert keeper.wait(timeout=60) == 75
        assert (kept / "last").read_text() == "SIGTERM"
        assert not list(kept.rglob(".tmp-*"))


@pytest.mark.skipif(shutil.which("rsync") is None, reason="no rsync on PATH")
def test_a_folder_that_was_fetched_by_halves_takes_nothing_from_the_copy(tmp_path: Path) -> None:
    folder, kept, bin_ = tmp_path / "machine", tmp_path / "bucket", tmp_path / "bin"
    bin_.mkdir()
    kept.mkdir()
    for name in ("first", "second"):
        (kept / name).write_text(name)
    # The machine is taken away in the middle of the first fetch.
    half = f"#!/bin/sh\ncp {kept}/first {folder}/\nkill -9 $PPID\n"
    program(bin_, "rsync", half.replace("{", "{{").replace("}", "}}"))
    command = ["bash", str(LAUNCHERS / "keep.sh"), f"{folder}/", str(kept), "true"]
    path = os.environ["PATH"]
    done = subprocess.run(command, env=os.environ | {"PATH": f"{bin_}:{path}"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [file.name for file in folder.iterdir()] == ["first"]
    subprocess.run(command, check=True)
    for place in (folder, kept):
        assert sorted(file.name for file in place.iterdir()) == ["first", "second"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bin", "bucket", "machine"]


@pytest.mark.skipif(shutil.which("rsync") is None, reason="no rsync on PATH")
def test_an_old_folder_does_not_overwrite_a_copy_that_is_further(tmp_path: Path) -> None:
    folder, kept = tmp_path / "machine", tmp_path / "bucket"
    for place, steps in ((folder, (100, 200)), (kept, (200, 300))):
        for step in steps:
            (place / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    command = ["bash", str(LAUNCHERS / "keep.sh"), str(folder), str(kept), "touch", f"{folder}/run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "bucket has step 00000300, but " in done.stderr
    assert "none beyond '00000200': the run went on elsewhere; move " in done.stderr
    assert [file.name for file in folder.iterdir()] == ["checkpoints"]
    (folder / "checkpoints" / "step-00000400").mkdir()
    subprocess.run(command, check=True)
    steps = sorted(int(step.name[5:]) for step in (kept / "checkpoints").iterdir())
    assert steps == [100, 200, 400]


def test_without_rsync_nothing_begins_that_would_not_be_kept(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "run.json").write_text("{}")
    command = [shutil.which("bash") or "bash", str(LAUNCHERS / "keep.sh")]
    arguments = [str(tmp_path / "folder"), str(tmp_path / "kept"), "touch", str(tmp_path / "begun")]
    (tmp_path / "bin").mkdir()
    for name in ("mkdir", "ls", "touch", "sleep"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    environment = os.environ | {"PATH": str(tmp_path / "bin")}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: keep.sh needs rsync")
    assert not (tmp_path / "begun").exists()


@pytest.mark.parametrize("arguments", [[], ["folder"], ["folder", "kept"]])
def test_keep_without_a_command_prints_its_usage(arguments: list[str], tmp_path: Path) -> None:
    command = ["bash", str(LAUNCHERS / "keep.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("launchers/keep.sh FOLDER KEPT COMMAND…\n")
    assert "set -euo" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_sky_task_has_a_command_that_train_sh_takes() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    task = yaml.safe_load((LAUNCHERS / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] is True
    assert set(task["resources"]["job_recovery"]["recover_on_exit_codes"]) == {5, 75}
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    assert "launchers/train.sh --config" in task["run"]
    for text in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
