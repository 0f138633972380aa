"""`apps/evaluate.py`: from a run and task files to a table, JSON and a row of the run's metrics."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from killable_runs import TrainServer
from matilda_data import measure_overlap
from matilda_train import RunDir, write_report
from matilda_train.app import run_app
from matilda_train.evals import (
    Pair,
    ScoredTransformer,
    encode_pairs,
    evaluate_harness,
    open_run,
    score_pairs,
)
from matilda_train.evals.task_files import read_tasks
from matilda_train.metrics_log import read_rows

ROOT = Path(__file__).parents[1]
WORDS = ["the", "heart", "tree", "river", "light", "falls"]

App = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def evaluate(server: TrainServer, tmp_path: Path) -> App:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        given = [str(argument) for argument in arguments]
        return server.run_program(ROOT / "apps" / "evaluate.py", given, tmp_path)

    return run


@pytest.fixture
def run_dir(twin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(twin, tmp_path / "run"))


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(3)

    def text(n: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(n))

    def write(name: str, items: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps({"id": f"q{i}", **item}) + "\n" for i, item in enumerate(items))
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))

    write(
        "sciq_val",
        [
            {"context": text(2), "choices": [text(1), text(2)], "label": draw.randrange(2)}
            for _ in range(20)
        ],
    )
    write(
        "winogrande_val",
        [
            {"contexts": [text(1), text(2)], "continuation": text(1), "label": draw.randrange(2)}
            for _ in range(10)
        ],
    )
    write("lambada_openai_test", [{"context": text(2), "continuation": " the"} for _ in range(10)])
    return folder


TASKS = "sciq,winogrande,lambada_openai"


def test_a_run_is_scored_and_keeps_its_scores(
    evaluate: App, run_dir: Path, task_dir: Path, tmp_path: Path
) -> None:
    before = (run_dir / "metrics.jsonl").read_bytes()
    out = tmp_path / "out" / "scores.json"
    done = evaluate(
        *("--run", run_dir, "--tasks", TASKS, "--task-dir", task_dir, "--device", "cpu"),
        *("--compare", "pythia-160m,pythia-410m", "--json", out),
        *("--write", tmp_path / "RESULTS.md", "--name", "tried"),
    )
    assert done.returncode == 0, done.stderr
    for words in (" ± ", "beside pythia-410m", "average", "HellaSwag is not among its results"):
        assert words in done.stdout
    results = json.loads(out.read_text())
    kept = json.loads((run_dir / "evals" / "step-00000012.json").read_text())
    assert kept == results
    assert (results["step"], results["tokens"]) == (12, 12 * 256)
    assert results["run_id"] == RunDir.read(run_dir)["run_id"]
    assert results["comparisons"]["pythia-160m"]["sciq"]["acc"] == results["tasks"]["sciq"]["acc"]
    page = (tmp_path / "RESULTS.md").read_text()
    head, _, made_by = page.partition("```sh")
    assert head.startswith("# Results\n\n<!-- evaluation: tried -->\n## tried\n")
    assert f"| sciq | 20 | {100 * results['tasks']['sciq']['acc']:.2f} ± " in head
    assert head.count("| average | ") == 2
    assert "uv run apps/evaluate.py --run" in made_by
    assert f"commit {(results['git_sha'] or 'unknown')[:12]}" in made_by
    assert f"data set {results['data_id'][:12]}" in made_by
    # The scores are those of the checkpoint, item by item.
    subject = open_run(run_dir, device="cpu")
    (winogrande,) = read_tasks(task_dir, ["winogrande"])
    right = ""
    for item in winogrande.items:
        pairs: list[Pair] = encode_pairs(subject.coder, item.texts)
        assert isinstance(subject.model, ScoredTransformer)
        scores = score_pairs(subject.model, pairs).loglikelihood
        right += "01"[int(scores.argmax()) == item.label]
    assert results["tasks"]["winogrande"]["correct"] == right
    assert results["tasks"]["winogrande"]["acc"] == pytest.approx(right.count("1") / 10)
    # One row more, and everything before it as it was.
    after = (run_dir / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    row = json.loads(after[len(before) :])
    assert row["step"] == 12
    assert row["task_scores"]["sciq"]["acc"] == results["tasks"]["sciq"]["acc"]
    assert set(row["task_scores"]["sciq"]) == {
        *("items", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    }
    assert "task_scores/sciq/acc" in write_report([run_dir], tmp_path / "report.html").read_text()


def test_tasks_scored_before_stay_in_the_runs_file(
    evaluate: App, run_dir: Path, task_dir: Path
) -> None:
    for task in ("sciq", "winogrande"):
        given = ("--run", run_dir, "--tasks", task, "--task-dir", task_dir)
        done = evaluate(*given, "--compare", "pythia-160m")
        assert done.returncode == 0, done.stderr
    kept = json.loads((run_dir / "evals" / "step-00000012.json").read_text())
    assert list(kept["tasks"]) == ["sciq", "winogrande"]
    assert list(kept["comparisons"]["pythia-160m"]) == ["sciq", "winogrande", "average"]


def test_a_run_goes_on_after_an_evaluation_as_if_there_had_been_none(
    server: TrainServer,
    evaluate: App,
    task_dir: Path,
    tiny_config: Path,
    corpus: Path,
    twin: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, at_step=8) == -9
    done = evaluate(*("--run", run_dir, "--tasks", "sciq", "--task-dir", task_dir))
    assert done.returncode == 0, done.stderr
    step = json.loads(next((run_dir / "evals").glob("*.json")).read_text())["step"]
    assert 0 < step < 8
    assert server.run(tiny_config, run_dir, corpus) == 0, server.log.read_text()
    rows = read_rows(run_dir / "metrics.jsonl")
    scored = [row for row in rows if "task_scores" in row]
    assert [row["step"] for row in scored] == [step]
    hashes = [
        [(r["step"], r["batch_sha256"], r["loss_nats"]) for r in found if "batch_sha256" in r]
        for found in (rows, read_rows(twin / "metrics.jsonl"))
    ]
    assert hashes[0] == hashes[1]


def test_a_run_in_training_gets_its_file_but_no_row(
    evaluate: App, run_dir: Path, task_dir: Path
) -> None:
    before = (run_dir / "metrics.jsonl").read_bytes()
    with RunDir.hold(run_dir):
        done = evaluate(*("--run", run_dir, "--tasks", "sciq", "--task-dir", task_dir))
    assert done.returncode == 0, done.stderr
    assert "no row was added" in done.stdout
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert (run_dir / "evals" / "step-00000012.json").is_file()


def test_a_checkpoint_and_a_limit(evaluate: App, run_dir: Path, task_dir: Path) -> None:
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-2]
    done = evaluate(
        *("--checkpoint", newest, "--tasks", "sciq", "--task-dir", task_dir, "--limit", 5)
    )
    assert done.returncode == 0, done.stderr
    assert f"at step {int(newest.name[5:13])}," in done.stdout
    assert "sciq      5" in done.stdout
    assert not (run_dir / "evals").exists()  # a part of a task is no score of the run


def test_contaminated_items_are_counted_and_left_out(
    evaluate: App, run_dir: Path, task_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    copied = Path(shutil.copy(task_dir / "sciq_val.jsonl.gz", tmp_path / "tasks"))
    long = "under the light then falls the river and runs the heart tree under then and falls"
    items = gzip.decompress(copied.read_bytes()).decode()
    items += json.dumps({"id": "leaked", "context": long, "choices": ["a", "b"], "label": 0}) + "\n"
    copied.write_bytes(gzip.compress(items.encode()))
    (tmp_path / "corpus.txt").write_text(f"Once: {long.upper()}!")
    overlap = tmp_path / "overlap.json"
    overlap.write_text(json.dumps(measure_overlap([copied], inputs=[tmp_path / "corpus.txt"])))
    arguments = ("--run", run_dir, "--tasks", "sciq", "--task-dir", tmp_path / "tasks")
    done = evaluate(*arguments, "--contamination", overlap)
    assert done.returncode == 0, done.stderr
    assert "1 of 1" in done.stdout  # the others have no 13 words
    tasks = json.loads((run_dir / "evals" / "step-00000012.json").read_text())["tasks"]
    assert (tasks["sciq"]["items"], tasks["sciq_clean"]["items"]) == (21, 20)
    assert tasks["sciq"]["contaminated"] == 1
    assert tasks["sciq"]["correct"][:20] == tasks["sciq_clean"]["correct"]
    # Measured in other text than the model has seen, or on another file, it says nothing of this.
    report = json.loads(overlap.read_text())
    for data_id in ("0" * 64, json.loads((run_dir / "run.json").read_text())["data_id"]):
        report["searched"]["data_id"] = data_id
        (tmp_path / "other.json").write_text(json.dumps(report))
        done = evaluate(*arguments, "--contamination", tmp_path / "other.json")
        refused = "was measured in data set 000000000000, but the model" in done.stderr
        assert (done.returncode, refused) == ((2, True) if data_id == "0" * 64 else (0, False))
    copied.write_bytes(gzip.compress(items.encode() * 2))
    done = evaluate(*arguments, "--contamination", overlap)
    assert (done.returncode, "another 'sciq_val.jsonl.gz'" in done.stderr) == (2, True)


def test_a_hub_out_of_reach_is_a_failure_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs the eval extra")

    def unreachable(*_: object) -> None:
        raise ConnectionError("Couldn't reach the hub")

    def main() -> int:
        evaluate_harness(None, ["sciq"])
        return 0

    monkeypatch.setattr(tasks.TaskManager, "load", unreachable)
    with pytest.raises(SystemExit) as ended:
        run_app(main)
    assert ended.value.code == 4
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: The data of sciq cannot be loaded (Couldn't reach the hub)")


def test_scores_that_cannot_be_kept_are_told_all_the_same(
    evaluate: App, run_dir: Path, task_dir: Path
) -> None:
    (run_dir / "evals").write_text("in the way")
    done = evaluate("--run", run_dir, "--tasks", "sciq", "--task-dir", task_dir, "--json")
    assert done.returncode == 4
    assert "evals" in done.stderr.splitlines()[-1]
    assert len(json.loads(done.stdout)["tasks"]["sciq"]["correct"]) == 20


def test_mistakes_are_named_before_anything_is_scored(
    evaluate: App, run_dir: Path, task_dir: Path, tmp_path: Path
) -> None:
    def refused(*arguments: str | Path) -> str:
        done = evaluate(*arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    files = ("--task-dir", task_dir)
    assert "'sciqq' is not among" in refused("--run", run_dir, "--tasks", "sciqq", *files)
    assert "each once" in refused("--run", run_dir, "--tasks", "sciq,sciq", *files)
    assert "no results of 'gpt-2'" in refused(
        "--run", run_dir, "--tasks", "sciq", *files, "--compare", "gpt-2"
    )
    assert "does not exist" in refused("--run", run_dir, "--task-dir", tmp_path / "none")
    assert "not a run directory" in refused("--run", tmp_path / "none", *files)
    assert "no `config.json`" in refused("--hf", tmp_path, *files)
    assert "`--limit` must be 1" in refused("--run", run_dir, *files, "--limit", "0")
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    assert "no result of" in refused(
        "--run", run_dir, "--tasks", "sciq", *files, "--contamination", wrong
    )
    assert not (run_dir / "evals").exists()
