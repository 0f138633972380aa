"""`verify_resume` kills for real; it finds no difference where none is, and names one that is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from killable_runs import ServedNursery, TrainServer
from matilda_train.kernel_noise import measure_noise
from matilda_train.lives import Fault, Life, Nursery
from matilda_train.metrics_log import read_rows
from matilda_train.phases import PHASES, PhaseClock
from matilda_train.resume_report import ResumeReport, as_json, describe
from matilda_train.run_comparison import compare
from matilda_train.state_digest import digest
from matilda_train.verify_resume import verify_resume

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def nursery(server: TrainServer, tmp_path: Path) -> Nursery:
    return ServedNursery(server, tmp_path / "output.log")


class Prompt(ServedNursery):
    """Faults come at the very beginning of their phase: how fast the machine is decides nothing."""

    def run(self, request: Mapping[str, Any], log: Path, fault: Fault | None = None) -> Life:
        return super().run(request, log, fault and replace(fault, delay_ms=0))


def test_kills_in_every_phase_leave_no_difference(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    proof = tmp_path / "proof"
    nursery = Prompt(server, tmp_path / "output.log")

    def prove(kills: int) -> ResumeReport:
        return verify_resume(
            tiny_config, work_dir=proof, data_dir=corpus, kills=kills, seed=4, nursery=nursery
        )

    report = prove(12)
    assert report.differences == []
    assert report.n_kills == 12
    assert report.runs >= 2
    assert report.resume_points >= 5
    assert {name for name, _ in report.kills} == {"SIGKILL", "SIGTERM"}
    assert len({phase for _, phase in report.kills}) >= 5
    assert "0 differences" in describe(report)

    # The same command has nothing left to do, and says the same; another is refused.
    assert as_json(prove(12)) == as_json(report)
    with pytest.raises(ValueError, match="proof of other options"):
        prove(13)

    # A restored state that is not the saved one is named.
    for log in (proof / "lives").iterdir():
        rows = [row | ({"digest": "0" * 16} if "restored" in row else {}) for row in read_rows(log)]
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prove(12).differences
    assert len(found) == report.resume_points
    assert all("is not the saved one" in difference for difference in found)


def test_a_proof_prepares_the_corpus_of_the_config_anew_for_some_lives(
    server: TrainServer, tmp_path: Path
) -> None:
    config = tmp_path / "own.json"
    sections = json.loads((ROOT / "configs/verify_resume.json").read_text())
    sections["data"]["dir"] = str(tmp_path / "data")
    sections["train"]["total_steps"] = 6
    config.write_text(json.dumps(sections))
    proof = tmp_path / "proof"
    nursery = Prompt(server, tmp_path / "output.log")
    report = verify_resume(config, work_dir=proof, data_dir=None, kills=1, seed=4, nursery=nursery)
    assert report.differences == []
    assert report.runs == 1
    victim, twin = (
        json.loads((proof / run / "run.json").read_text()) for run in ("victim-000", "twin")
    )
    assert victim["config"]["data"]["dir"] == str(proof / "victim-000-data")
    assert victim["data_id"] == twin["data_id"]


class Interrupting(ServedNursery):
    """Ctrl-C instead of the third life, after which it waits for nobody."""

    lives = 0

    def run(self, request: Mapping[str, Any], log: Path, fault: Fault | None = None) -> Life:
        self.lives += 1
        if self.lives == 3:
            os.utime(log, (0, 0))
            for file in (log.parent.parent / "victim-000").glob("*.jsonl"):
                os.utime(file, (0, 0))
            raise KeyboardInterrupt
        return super().run(request, log, fault)


def test_kills_spread_over_one_run_are_accounted_for(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    proof, output = tmp_path / "proof", tmp_path / "output.log"

    def prove(nursery: Nursery, **options: float) -> ResumeReport:
        return verify_resume(
            tiny_config,
            work_dir=proof,
            data_dir=corpus,
            spread=(2, 1),
            overrides=["train.total_steps=20", "train.micro_batch_size=auto"],
            nursery=nursery,
            **options,
        )

    paused = prove(ServedNursery(server, output), pause_after_seconds=-1)
    assert not paused.complete
    assert "run the same command again" in describe(paused)
    with pytest.raises(KeyboardInterrupt):
        prove(Interrupting(server, output))
    os.utime(proof / "record.jsonl", (time.time() - 5000,) * 2)

    report = prove(ServedNursery(server, output))
    assert report.complete
    assert report.differences == []
    assert report.runs == 1
    assert report.interruptions == {"victim-000": 1}
    assert 5000 <= report.idle_seconds < 6000
    assert report.goodput is not None
    assert report.goodput.restarts >= 1
    assert sum(report.goodput.seconds.values()) == pytest.approx(report.goodput.wall_seconds)
    said = describe(report)
    assert "goodput" in said
    assert "interrupted 1 times at victim-000" in said
    assert as_json(report)["environment"]["device"] == "cpu"
    assert as_json(prove(ServedNursery(server, output))) == as_json(report)


def test_resumed_lives_find_the_caches_of_a_new_machine(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    proof, met = tmp_path / "proof", []

    class Watched(ServedNursery):
        def run(self, request: Mapping[str, Any], log: Path, fault: Fault | None = None) -> Life:
            caches = Path(request["caches"])
            met.append((Path(request["run_dir"]).name, caches.exists()))
            caches.mkdir(exist_ok=True)
            return super().run(request, log, fault)

    report = verify_resume(
        tiny_config,
        work_dir=proof,
        data_dir=corpus,
        spread=(1, 1),
        overrides=["train.total_steps=20"],
        new_machines=True,
        nursery=Watched(server, tmp_path / "output.log"),
    )
    assert report.differences == []
    assert met == [("twin", False), ("victim-000", True)] + [("victim-000", False)] * (len(met) - 2)
    assert len(met) >= 4
    assert not (proof / "machine").exists()
    assert len(report.first_starts) == 2
    assert 1 <= len(report.resumes) <= 2
    report.resumes_compiled = [True, False]
    said = describe(report)
    assert "resumed, " in said
    assert "1 of 2 resumes traced or compiled anything" in said


def test_compilers_of_a_life_keep_what_they_make_where_they_are_told(tmp_path: Path) -> None:
    """torch's and Triton's own answers, in a process that lives as a life does."""
    program = (
        "import sys, os, matilda_train.lives as lives\n"
        "lives._train = lambda *_: lives_train()\n"
        "def lives_train():\n"
        "    from torch._inductor.runtime.runtime_utils import cache_dir\n"
        "    os.write(1, cache_dir().encode())\n"
        "    return 0\n"
        "lives.live({'output': sys.argv[1], 'caches': sys.argv[2]}, None)\n"
    )
    output, caches = tmp_path / "out", tmp_path / "machine"
    command = [sys.executable, "-c", program, str(output), str(caches)]
    environment = os.environ | {"TRITON_CACHE_DIR": "/elsewhere"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as life:
        code = life.wait()  # its input stays open until then: it would end with its parent
    assert code == 0, output.read_text()
    assert output.read_text() == f"{caches}/TORCHINDUCTOR_CACHE_DIR"


@pytest.mark.slow
def test_proof_killed_with_a_life_under_way_goes_on(
    tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    """Lives end with the proof that began them: an orphan would hold the run directory."""
    proof, app = tmp_path / "proof", Path(__file__).parent.parent / "apps" / "verify_resume.py"
    command = [
        *(sys.executable, str(app), "--config", str(tiny_config), "--data-dir", str(corpus)),
        *("--kills", "3", "--run-dir", str(proof), "--set", "train.total_steps=600"),
        *("ckpt.every_steps=150", "log.every_steps=50"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (proof / "twin" / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 differences" in done.stdout
    assert "interrupted 1 times at twin" in done.stdout


@pytest.mark.slow
def test_five_hundred_kills_leave_no_difference(
    tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    report = verify_resume(
        tiny_config, work_dir=tmp_path / "proof", data_dir=corpus, kills=500, seed=2
    )
    assert report.differences == []


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", ["true", "false"])
def test_kills_on_a_gpu_leave_no_difference(
    deterministic: str, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    report = verify_resume(
        tiny_config,
        work_dir=tmp_path / "proof",
        data_dir=corpus,
        spread=(2, 1),
        overrides=["train.device=cuda", f"train.deterministic={deterministic}"],
    )
    assert report.differences == []
    assert report.bitwise == (deterministic == "true")


def test_life_is_counted_where_its_signal_met_it() -> None:
    records = [{"phase": "starting"}, {"phase": "training"}, {"fired": "SIGTERM"}]
    stopped = Life(code=75, began=0.0, ended=1.0, records=[*records, {"phase": "saving"}])
    assert (stopped.phase, stopped.fired) == ("training", True)
    assert Life(code=-9, began=0.0, ended=1.0, records=[{"fired": "SIGKILL"}]).phase == "importing"


def test_differences_are_named() -> None:
    rows = [{"step": 1, "loss_nats": 2.0}, {"step": 2, "loss_nats": 1.5}]
    other = [{"step": 1, "loss_nats": 2.0}, {"step": 2, "loss_nats": 1.25}]
    state = {"/model/embed": "aa", "/loop/step": "bb"}
    assert compare("v", state, rows, state, rows) == []
    found = compare("v", state | {"/model/embed": "cc"}, other[:2], state, rows)
    assert [("/model/embed" in f, "step 2" in f) for f in found] == [(True, False), (False, True)]
    assert "1 metrics rows, the twin has 2" in compare("v", state, rows[:1], state, rows)[0]


def test_digest_sees_one_bit_anywhere() -> None:
    state = {"model": {"w": torch.randn(300, 7)}, "loop": [1, 0.5, torch.arange(9).byte()]}
    before = digest(state)
    assert digest(state) == before
    w = state["model"]["w"]  # type: ignore[call-overload,index]
    for place in (0, 1, 2099):
        flat = w.view(-1)
        kept = flat[place].clone()
        flat[place] = torch.nextafter(kept, torch.tensor(9e9))
        assert digest(state) != before
        flat[place] = kept
    assert digest(state) == before
    state["loop"][1] = 0.25  # type: ignore[index]
    assert digest(state) != before


def test_noise_passes_and_a_wrong_batch_or_loss_does_not(twin: Path, tmp_path: Path) -> None:
    """Two runs that differ by rounding, made from one that did not."""
    rows = read_rows(twin / "metrics.jsonl")

    def variant(name: str, loss: float, **changes: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        with (folder / "metrics.jsonl").open("w") as file:
            for number, row in enumerate(rows):
                if "loss_nats" in row:
                    row = row | {"loss_nats": row["loss_nats"] + loss * (-1) ** number} | changes
                file.write(json.dumps(row) + "\n")
        return folder

    second, within = variant("second", 1e-6), variant("within", 2e-6)
    assert measure_noise(twin, second, within).differences == []
    assert "quarter 1" in measure_noise(twin, second, variant("beyond", 1e-4)).differences[0]
    wrong = measure_noise(twin, second, variant("wrong", 1e-6, batch_sha256="f" * 64))
    assert "`batch_sha256` of step 1" in wrong.differences[0]
    shutil.copy(second / "metrics.jsonl", within / "metrics.discarded.jsonl")
    noise = measure_noise(twin, second, within)
    assert noise.redone_steps == 12
    assert noise.largest_redone == pytest.approx(1e-6, rel=1e-3)
    shutil.copy(variant("lost", 1e-4) / "metrics.jsonl", within / "metrics.discarded.jsonl")
    assert "steps done again" in measure_noise(twin, second, within).differences[0]
    report = ResumeReport(bitwise=False, noise=noise)
    assert "quarter 4" in describe(report)
    json.dumps(as_json(report))


def test_noise_that_grows_may_do_so_earlier_by_a_quarter_but_no_more(tmp_path: Path) -> None:
    def run(name: str, begins: int) -> Path:
        (tmp_path / name).mkdir()
        with (tmp_path / name / "metrics.jsonl").open("w") as file:
            for step in range(1, 41):
                loss = 5.0 + 1e-6 * 10 ** min(4.0, max(0.0, (step - begins) / 2)) * (name != "one")
                file.write(json.dumps({"step": step, "loss_nats": loss}) + "\n")
        return tmp_path / name

    one, two = run("one", 0), run("two", 22)
    assert measure_noise(one, two, run("soon", 14)).differences == []
    assert "quarter 1" in measure_noise(one, two, run("too-soon", 2)).differences[0]


def test_directory_in_use_is_refused(tiny_config: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        verify_resume(tiny_config, work_dir=tmp_path, data_dir=corpus, kills=1)


def test_bad_config_is_refused_before_anything_runs(tmp_path: Path, corpus: Path) -> None:
    config = tmp_path / "bad.json"
    config.write_text(json.dumps({"train": {"total_stepz": 3}}))
    with pytest.raises(ValueError, match="total_steps"):
        verify_resume(config, work_dir=tmp_path / "proof", data_dir=corpus, kills=1)
    assert not (tmp_path / "proof").exists()


def test_mistake_that_a_life_meets_is_a_mistake_of_the_users(
    nursery: Nursery, tiny_config: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"nowhere.* does not exist; prepare one"):
        verify_resume(
            tiny_config,
            work_dir=tmp_path / "proof",
            data_dir=tmp_path / "nowhere",
            kills=1,
            nursery=nursery,
        )


def test_every_second_belongs_to_one_phase() -> None:
    met: list[str] = []
    clock = PhaseClock(met.append)
    with clock.during("preparing data"):
        clock.enter("preparing data")
    clock.enter("training")
    assert met == ["starting", "preparing data", "preparing data", "starting", "training"]
    assert set(clock.seconds()) == {"starting", "preparing data", "training"}
    assert all(phase in PHASES for phase in met)
    with pytest.raises(OSError, match="gone"), clock.during("restoring"):
        raise OSError("gone")
    assert clock.current == "training"
