"""Pre-flight says yes or no before the money is spent, for real reasons, and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from killable_runs import TrainServer
from matilda_train import RunDir, load_config, run_preflight
from matilda_train.metrics_log import read_rows
from matilda_train.micro_batch import sizes_that_divide
from matilda_train.trial_step import StepTrial, TrialRun, largest_that_fits

ROOT = Path(__file__).resolve().parent.parent


def everything_in(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def verdicts(config: Path, corpus: Path, run_dir: Path, *overrides: str) -> dict[str, str]:
    report = run_preflight(load_config(config, overrides), run_dir=run_dir, data_dir=corpus)
    return {finding.subject: finding.verdict for finding in report.findings}


def test_a_run_that_works_gets_a_yes_with_its_figures(
    tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    before = everything_in(corpus)
    report = run_preflight(
        load_config(tiny_config), run_dir=tmp_path / "new", data_dir=corpus, dollars_per_hour=3.6
    )
    assert report.ok
    assert "Pre-flight: yes" in str(report)
    assert everything_in(corpus) == before
    assert list(tmp_path.iterdir()) == []
    figures: dict[str, Any] = json.loads(json.dumps(report.to_dict()))["figures"]
    assert figures["tokens"] == 12 * 256
    assert figures["micro_batch_size"] == 4
    assert figures["dollars"] == pytest.approx(3.6 * figures["seconds"] / 3600)
    # each source's share of 96 samples over its windows
    assert 0 < figures["epochs"][next(iter(figures["epochs"]))] < 4
    # float32: weights, and Muon's momentum or AdamW's two moments for each
    assert 8 < figures["state_bytes"] / figures["parameters"] < 12.1


def test_the_state_is_as_large_as_its_checkpoint(
    tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    report = run_preflight(load_config(tiny_config), run_dir=tmp_path / "new", data_dir=corpus)
    newest = max((twin / "checkpoints").glob("step-*"))
    stored = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    assert report.figures["state_bytes"] == pytest.approx(stored, rel=0.25)


def test_every_reason_against_is_named(tiny_config: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    found = verdicts(
        tiny_config,
        tmp_path / "no such data",
        tmp_path / "taken",
        "train.micro_batch_size=3",
    )
    assert {subject for subject, verdict in found.items() if verdict == "no"} == {
        "data",
        "run",
        "batch",
    }


def test_unasked_it_takes_no_steps_once_the_answer_is_no(tiny_config: Path, tmp_path: Path) -> None:
    report = run_preflight(
        load_config(tiny_config), run_dir=tmp_path / "new", data_dir=tmp_path, thorough=False
    )
    found = {finding.subject: finding.verdict for finding in report.findings}
    assert found["data"] == "no"
    assert "memory" not in found


def test_tasks_are_read_before_the_run_needs_them(
    tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    item = {"context": "the", "choices": ["heart", "tree"], "label": 0}
    (tmp_path / "quiz_val.jsonl").write_text(json.dumps(item) + "\n")
    for name, ok in (("quiz", True), ("quizz", False)):
        chosen = [f'eval.tasks=["{name}"]', f"eval.task_dir={tmp_path}"]
        config = load_config(tiny_config, chosen)
        report = run_preflight(config, run_dir=tmp_path / "run", data_dir=corpus)
        (found,) = (finding for finding in report.findings if finding.subject == "tasks")
        assert (found.verdict == "yes") == ok == report.ok
        assert "quiz" in found.said


def test_too_small_a_disk_is_found(tiny_config: Path, corpus: Path, tmp_path: Path) -> None:
    found = verdicts(tiny_config, corpus, tmp_path / "new", "ckpt.keep_last=100000000")
    assert found["disk"] == "no"


def test_checkpoints_kept_for_good_are_counted(
    tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    config = load_config(tiny_config, ["ckpt.every_steps=2", "ckpt.keep_every=3"])
    report = run_preflight(config, run_dir=tmp_path / "new", data_dir=corpus)
    # steps 6 and 12 for good, 3 newest, 1 being written
    assert report.figures["checkpoints_kept"] == 6


def test_a_run_that_goes_on_is_recognised(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, at_step=5, signal="SIGTERM") == 75
    before = everything_in(run_dir)
    report = run_preflight(load_config(tiny_config), run_dir=run_dir, data_dir=corpus)
    assert report.figures["tokens"] == (12 - 5) * 256
    assert everything_in(run_dir) == before
    other = run_preflight(
        load_config(tiny_config, ["optim.lr=1"]), run_dir=run_dir, data_dir=corpus
    )
    assert not other.ok
    assert any("another config" in finding.said for finding in other.findings)


# The app as a person starts it, in a process that may take 128 MiB more than it has by then.
SHORT_OF_MEMORY = """
import resource, runpy, sys
from pathlib import Path
from matilda_train import load_config, run_preflight
app, config, data, run = sys.argv[1:5]
run_preflight(load_config(config), run_dir=run, data_dir=data)  # loads what torch loads late
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 128 * 2**20,) * 2)
sys.path.insert(0, str(Path(app).parent))
sys.argv = [app, "--config", config, "--data-dir", data, "--run-dir", run, *sys.argv[5:]]
runpy.run_path(app, run_name="__main__")
"""


@pytest.mark.slow
def test_what_does_not_fit_is_tried_smaller_and_the_app_says_no(
    tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", SHORT_OF_MEMORY, str(ROOT / "apps" / "train.py")),
            *(str(tiny_config), str(corpus), str(tmp_path / "new"), "--preflight", "--json"),
            *("--set", "train.micro_batch_size=512", "train.tokens_per_step=16384"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2, done.stderr
    assert "micro-batch of 512: does not fit" in done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    said = {finding["subject"]: finding for finding in report["findings"]}
    assert said["memory"]["verdict"] == "no"
    assert "a micro-batch of 512 does not fit" in said["memory"]["said"]
    assert 1 <= report["figures"]["micro_batch_size"] < 512
    assert list(tmp_path.iterdir()) == []


class Memory:
    """A device on which a step takes `fixed + each × size` bytes."""

    def __init__(self, budget: int, fixed: int, each: int) -> None:
        self.budget_bytes, self.fixed_bytes, self._each = budget, fixed, each

    def attempt(self, size: int) -> StepTrial:
        # an overhead that the search does not know of
        need = self.fixed_bytes + 37 + self._each * size
        fits = need <= self.budget_bytes
        return StepTrial(size, fits=fits, peak_bytes=need if fits else None)


@pytest.mark.parametrize("budget", [0, 136, 137, 140, 160, 300, 1000, 10_000])
@pytest.mark.parametrize("most", [1, 8, 64])
def test_the_search_finds_the_largest_in_few_trials(budget: int, most: int) -> None:
    sizes = [1 << n for n in range(most.bit_length())]
    tried: list[int] = []
    best = largest_that_fits(
        Memory(budget, 100, 3),  # type: ignore[arg-type]
        sizes,
        tried=lambda trial: tried.append(trial.micro_batch_size),
    )
    fitting = [size for size in sizes if 137 + 3 * size <= budget]
    assert (best.micro_batch_size if best else None) == (max(fitting) if fitting else None)
    assert len(tried) == len(set(tried)) <= 4


def test_auto_takes_a_size_that_divides_and_the_batch_is_the_same(
    server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    auto = ["train.micro_batch_size=auto"]
    assert server.run(tiny_config, run_dir, corpus, set=auto, at_step=4, signal="SIGTERM") == 75
    assert RunDir.read(run_dir)["config"]["train"]["micro_batch_size"] == 8
    assert server.run(tiny_config, run_dir, corpus, set=auto) == 0
    rows = [
        [row["batch_sha256"] for row in read_rows(run / "metrics.jsonl") if "loss_nats" in row]
        for run in (run_dir, twin)
    ]
    assert rows[0] == rows[1]


def test_sizes_divide_every_batch_of_a_ramp(tiny_config: Path) -> None:
    config = load_config(tiny_config, ['train.batch_ramp=["4 steps: 384"]'])
    assert sizes_that_divide(config, 1) == [1, 2, 4]
    assert sizes_that_divide(config, 2) == [1, 2]
    with pytest.raises(ValueError, match="does not divide by 3 devices"):
        sizes_that_divide(config, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: memory is not tried")
def test_on_a_gpu_the_largest_micro_batch_fits_and_twice_it_does_not(tiny_config: Path) -> None:
    model = ["model.d_model=1024", "model.n_layers=8", "model.n_heads=16", "model.max_seq_len=1024"]
    config = load_config(
        tiny_config,
        [
            *model,
            "train.device=cuda",
            "train.tokens_per_step=8388608",
            "train.micro_batch_size=auto",
        ],
    )
    run = TrialRun(config, torch.device("cuda"))
    try:
        best = largest_that_fits(run, sizes_that_divide(config, 1))
        assert best is not None
        again = run.attempt(best.micro_batch_size)
        assert again.fits
        assert again.peak_bytes is not None
        assert run.budget_bytes is not None
        assert 2 * again.peak_bytes - run.fixed_bytes > run.budget_bytes
    finally:
        run.close()
