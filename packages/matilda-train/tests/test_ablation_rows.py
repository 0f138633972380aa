"""Named changes, rows of one's own, grids, and the pages they end in."""

from __future__ import annotations

import fcntl
import json
import re
from pathlib import Path
from typing import Any

import pytest

from matilda_train.ablation import (
    VARIANTS,
    Job,
    Progress,
    Study,
    StudyTerminal,
    describe_grid,
    describe_study,
    grid_rows,
    places,
    rank_grid,
    read_study,
    resolve_rows,
    run_halving,
    run_study,
    write_document,
    write_grid,
)
from matilda_train.config import RunConfig
from matilda_train.config_load import config_from_dict, config_to_dict, load_config
from matilda_train.report.section import replace_section

CONFIGS = Path(__file__).parents[3] / "configs"


def load(name: str, *overrides: str) -> RunConfig:
    if not CONFIGS.is_dir():
        pytest.skip("the configs are not part of the installed package")
    return load_config(CONFIGS / f"{name}.json", overrides)


@pytest.mark.parametrize("name", ["base_152m_v2", "base_124m", "base_350m", "ablation_48m"])
def test_every_named_row_fits_every_config_or_says_why_not(name: str) -> None:
    config = load(name)
    fitted, refusals = [], []
    for row in VARIANTS:
        try:
            fitted += resolve_rows(config, [row])[1:]
        except ValueError as refusal:
            refusals.append(str(refusal))
    assert all(row.config != config for row in fitted)
    assert all("leave" in refusal for refusal in refusals)
    assert len(fitted) >= 14


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("base_152m_v2", "swiglu"),
        ("base_152m_v2", "depth_12"),
        ("base_152m_v2", "head_dim_128"),
        ("base_124m", "relu2"),
        ("base_124m", "depth_18"),
        ("base_124m", "head_dim_128"),
        ("base_350m", "depth_18"),
        ("ablation_48m", "swiglu"),
        ("ablation_48m", "depth_12"),
        ("ablation_48m", "head_dim_128"),
    ],
)
def test_compensated_rows_have_the_parameters_of_the_baseline(name: str, row: str) -> None:
    config = load(name)
    changed = resolve_rows(config, [row])[1].config
    assert changed.model.n_params == pytest.approx(config.model.n_params, rel=0.005)
    assert changed.model.d_model <= 4 * changed.model.resolved_d_ff
    if row.startswith("depth"):
        assert changed.model.n_layers == int(row.removeprefix("depth_"))
        assert changed.model.resolved_head_dim == config.model.resolved_head_dim


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("no_qknorm", "Did you mean 'no_qk_norm'?"),
        ("mah", "Did you mean 'mha'?"),
        ("relu2", "'relu2' equals the baseline of this config (`model.mlp` = \"relu2\")"),
        ("mine:model.qk_norm=true", "equals the baseline"),
        ("mine:eval.sample_tokens=5", "equals the baseline"),
        ("mine:model.qknorm=true", "Did you mean `model.qk_norm`?"),
        ("mine:data.seed=5", "could not be paired"),
        ("mine:train.seq_len=512", "could not be paired"),
        ("mine:train.total_steps=5000", "could not be paired"),
        ("m/ne:model.qk_norm=false", "no name of a row"),
        ("baseline:model.qk_norm=false", "'baseline' is always a row"),
        ("mha,mha", "given twice"),
    ],
)
def test_rows_that_make_no_sense_are_refused_in_a_sentence(row: str, says: str) -> None:
    with pytest.raises(ValueError) as refusal:
        resolve_rows(load("base_152m_v2"), [row])
    assert says in str(refusal.value)


def test_a_row_of_ones_own_may_add_to_a_named_one_and_hold_lists() -> None:
    config = load("base_152m_v2")
    rows = resolve_rows(
        config, ["mha,adamw:optim.lr=0.002,optim.betas=[0.9,0.99]", "baseline", "x:model.z_loss=0"]
    )
    assert [row.name for row in rows] == ["baseline", "mha", "adamw", "x"]
    adamw = rows[2].config.optim
    assert (adamw.algorithm, adamw.lr, adamw.betas) == ("adamw", 0.002, (0.9, 0.99))


def test_another_batch_is_the_same_tokens_in_more_steps() -> None:
    config = load("base_152m_v2")
    row = resolve_rows(config, ["half:train.tokens_per_step=262144"])[1].config
    assert row.train.total_steps == 2 * config.train.total_steps
    assert row.optim.warmup_steps == 2 * config.optim.warmup_steps
    assert row.eval.every_steps == 2 * config.eval.every_steps


def test_steps_of_the_momentum_follow_another_batch_and_a_shorter_round(tmp_path: Path) -> None:
    config = load("ablation_48m", "optim.momentum_warmup_steps=300")
    doubled = resolve_rows(config, ["twice:train.tokens_per_step=262144"])[1].config
    assert (doubled.train.total_steps, doubled.optim.momentum_warmup_steps) == (160, 150)
    rounds: list[int] = []

    def run(study: Study) -> Any:
        rounds.append(study.rows[0].config.optim.momentum_warmup_steps)
        for job in study.jobs():
            end(job, [9.0, 3.0 + job.config.optim.lr])
        return "complete"

    rows = grid_rows(config, ["optim.lr=0.001,0.002"])
    run_halving(rows, seeds=1, out=tmp_path, rounds=3, run=run)
    assert rounds == [75, 150, 300]


def test_a_shortened_run_cannot_have_the_points_of_the_whole_one(tmp_path: Path) -> None:
    config = load("ablation_48m", 'data.mix=["a=1","200 steps: b=1"]')
    rows = grid_rows(config, ["optim.lr=0.001,0.002"])
    with pytest.raises(ValueError, match=r"`--halving` shortens runs, whose `data\.mix`"):
        run_halving(rows, seeds=1, out=tmp_path, rounds=2, run=lambda study: "complete")


def test_another_batch_may_not_move_the_mixture() -> None:
    config = load("ablation_48m", 'data.mix=["a=1","200 steps: b=1"]')
    with pytest.raises(ValueError, match=r"`data\.mix` from .*25600.* to .*51200"):
        resolve_rows(config, ["twice:train.tokens_per_step=262144"])
    by_tokens = load("ablation_48m", 'data.mix=["a=1","13107200 tokens: b=1"]')
    resolve_rows(by_tokens, ["twice:train.tokens_per_step=262144"])


@pytest.mark.parametrize("field", ["eval.tokens=1024", "train.spike_threshold=0.5"])
def test_runs_that_were_measured_otherwise_are_not_compared(field: str, tmp_path: Path) -> None:
    rows = resolve_rows(load("ablation_48m"), ["mha"])
    for job in Study(rows=rows, seeds=1, out=tmp_path).jobs():
        end(job, [9.0, 3.0])
    assert len(Study(rows=rows, seeds=2, out=tmp_path).jobs()) == 4
    others = resolve_rows(load("ablation_48m", field), ["mha", "mqa"])
    with pytest.raises(ValueError, match=f"measured otherwise .*{field.partition('=')[0]}"):
        Study(rows=others, seeds=1, out=tmp_path).jobs()


def test_a_row_is_measured_on_the_tokens_of_the_baseline() -> None:
    with pytest.raises(ValueError, match=r"`eval\.tokens` from 524288 to 1024"):
        resolve_rows(load("ablation_48m"), ["short:train.grad_clip=50,eval.tokens=1024"])


def test_a_grid_of_twice_the_rows_is_not_listed_more_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, listed = Study.jobs, []

    def counted(self: Study) -> list[Job]:
        listed[-1] += 1
        return jobs(self)

    for values in ("0.001,0.002,0.003", "0.001,0.002,0.003,0.004,0.005,0.006"):
        rows = grid_rows(load("ablation_48m"), [f"optim.lr={values}"])
        study = Study(rows=rows, seeds=1, out=tmp_path / values)
        for job in study.jobs():
            end(job, [9.0, 3.0 + job.config.optim.lr])
        listed.append(0)
        with monkeypatch.context() as patch:
            patch.setattr(Study, "jobs", counted)
            assert rank_grid(study).rows[0].name == "lr=0.001"
    assert listed[0] == listed[1]


def test_seeds_move_weights_and_order_of_every_row_alike(tmp_path: Path) -> None:
    config = load("base_152m_v2")
    study = Study(rows=resolve_rows(config, ["mha", "mqa"]), seeds=2, out=tmp_path)
    jobs = study.jobs()
    assert [job.seed for job in jobs] == [0, 0, 0, 1, 1, 1]
    for job in jobs:
        assert job.config.train.seed == config.train.seed + job.seed
        assert job.config.data.seed == config.data.seed + job.seed
    assert len({job.run_dir for job in jobs}) == 6


def test_a_grid_is_every_combination() -> None:
    config = load("base_152m_v2")
    rows = grid_rows(config, ["optim.lr=0.005,0.01", "optim.weight_decay=0,0.1"])
    assert [row.name for row in rows] == [
        "lr=0.005,weight_decay=0",
        "lr=0.005,weight_decay=0.1",
        "lr=0.01,weight_decay=0",
        "lr=0.01,weight_decay=0.1",
    ]
    assert rows[1].config.optim.weight_decay == 0.1
    with pytest.raises(ValueError, match="names a value twice"):
        grid_rows(config, ["optim.lr=0.1,0.1"])
    with pytest.raises(ValueError, match="must be positive"):
        grid_rows(config, ["optim.lr=-1"])
    for axis in ("optim.lr", "optim.lr="):
        with pytest.raises(ValueError, match=f"takes section.field=VALUE,VALUE…, but got '{axis}'"):
            grid_rows(config, [axis])


def end(job: Job, losses: list[float], *, diverged: bool = False) -> None:
    """Write what a run leaves behind that a study reads."""
    job.run_dir.mkdir(parents=True)
    config = config_to_dict(job.config)
    run = {"config": config, "run_id": "ab", "data_id": "cd", "device": "cpu"}
    (job.run_dir / "run.json").write_text(json.dumps(run))
    event = {"event": "diverged" if diverged else "finish", "step": len(losses)}
    (job.run_dir / "events.jsonl").write_text(json.dumps(event) + "\n")
    rows = [
        {"step": step, "val_loss_nats": loss, "val_bits_per_byte": loss}
        for step, loss in enumerate(losses)
    ]
    (job.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_point_that_diverged_at_a_seed_is_not_the_best(tmp_path: Path) -> None:
    rows = grid_rows(load("ablation_48m"), ["optim.lr=0.001,0.01,0.1"])
    study = Study(rows=rows, seeds=2, out=tmp_path)
    for job in study.jobs():
        lucky = job.row == "lr=0.1"
        loss = 3.0 if lucky else 3.2 + 0.1 * rows.index(next(r for r in rows if r.name == job.row))
        end(job, [9.0, loss + 0.01 * job.seed], diverged=lucky and job.seed == 1)
    ranked = rank_grid(study)
    assert [row.name for row in ranked.rows] == ["lr=0.001", "lr=0.01", "lr=0.1"]
    assert "Best: optim.lr=0.001" in describe_grid(ranked)
    assert "1 seed diverged, the others " in describe_study(ranked)


def test_points_and_rows_that_have_not_begun_are_named_and_not_judged(tmp_path: Path) -> None:
    study = Study(
        rows=grid_rows(load("ablation_48m"), ["optim.lr=0.001,0.01,0.1"]), seeds=2, out=tmp_path
    )
    end(study.jobs()[0], [9.0, 3.0], diverged=False)
    ranked = rank_grid(study)
    assert "widen" not in describe_grid(ranked)
    write_grid(ranked, tmp_path / "page.md", name="rates", command="that made it")
    page = (tmp_path / "page.md").read_text()
    assert page.count("| best |") == 1
    assert "`lr=0.01`" not in page
    assert "Not ended when this was written: lr=0.001 seed 1, all of lr=0.01, lr=0.1." in page

    rows = resolve_rows(load("ablation_48m"), ["mha", "mqa"])
    study = Study(rows=rows, seeds=1, out=tmp_path / "study")
    for job in study.jobs()[:2]:
        end(job, [9.0, 3.0], diverged=False)
    found = read_study(study)
    assert "mqa" not in describe_study(found)
    # Not "the same command again": with --report that would say so for ever.
    assert "1 run not ended yet; the same command without `--report`" in describe_study(found)
    write_document(found, tmp_path / "page.md", name="study", command="that made it")
    page = (tmp_path / "page.md").read_text()
    assert "| mha |" in page
    assert "| mqa |" not in page
    assert "Not ended when this was written: all of mqa." in page


def test_what_else_the_machine_does_is_not_a_rows_speed(tmp_path: Path) -> None:
    study = Study(rows=resolve_rows(load("ablation_48m"), ["mha"]), seeds=3, out=tmp_path / "study")
    for job in study.jobs():
        own = 1000.0 if job.row == "baseline" else 900.0
        disturbed = 40 if job.seed == 2 else 35
        speeds = [own * (0.7 if at < disturbed else 1.0 - 0.01 * job.seed) for at in range(41)]
        end(job, [9.0, 3.0])
        with (job.run_dir / "metrics.jsonl").open("a") as file:
            for at, speed in enumerate(speeds):
                row = {"step": at + 1, "batch_sha256": str(at), "tokens_per_second": speed}
                file.write(json.dumps(row) + "\n")
    found = read_study(study)
    assert [run.tokens_per_second for run in found.rows[1].runs] == [900.0, 891.0, 630.0]
    write_document(found, tmp_path / "page.md", name="study", command="that made it")
    page = (tmp_path / "page.md").read_text()
    assert re.search(r"^\| baseline .* \| 1,000 \| – \|$", page, re.MULTILINE)
    assert re.search(r"^\| mha .* \| 900 \| – \|$", page, re.MULTILINE)
    assert "The two fastest seeds of a row differ by up to 1.0 % in tokens/s" in page


def test_a_second_call_stays_out_of_a_study_in_training(tmp_path: Path) -> None:
    study = Study(rows=resolve_rows(load("ablation_48m"), ["mha"]), seeds=1, out=tmp_path)

    def call(**where: Any) -> str:
        display = StudyTerminal(interval=60.0)
        return run_study(study, data_dir=None, stop=lambda: True, display=display, **where)

    with (tmp_path / "study.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for where in ({"in_process": True}, {}):
            with pytest.raises(ValueError, match="Another process is training the study"):
                call(**where)
        assert call(where=()) == "stopped"  # looking on is free
    assert call(in_process=True) == "stopped"


def test_looking_makes_no_folder_and_a_run_is_no_place_for_a_study(tmp_path: Path) -> None:
    def look(out: Path) -> str:
        study = Study(rows=resolve_rows(load("ablation_48m"), ["mha"]), seeds=1, out=out)
        display = StudyTerminal(interval=60.0)
        return run_study(study, data_dir=None, where=(), stop=lambda: True, display=display)

    assert look(tmp_path / "mistyped") == "stopped"
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a run .* `--out` a folder of its own"):
        look(run)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "run.json"]


def test_a_disk_too_small_for_all_checkpoints_is_named_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kept, keep, warned in ((2, True, False), (10**12, True, True), (10**12, False, False)):
        rows = resolve_rows(load("quickstart", f"ckpt.keep_last={kept}"), [])
        run_study(
            Study(rows=rows, seeds=1, out=tmp_path),
            data_dir=None,
            in_process=True,
            keep_checkpoints=keep,
            stop=lambda: True,
            display=StudyTerminal(interval=60.0),
        )
        assert ("`--discard-checkpoints`" in capsys.readouterr().err) == warned


def test_places_take_the_visible_gpus_in_turn() -> None:
    assert places(None, 2) == [None, None]
    assert places(2, 2) == ["0", "1", "0", "1"]
    assert places(1, 1, "3,5") == ["3"]
    with pytest.raises(ValueError, match="names 2"):
        places(3, 1, "3,5")


def test_a_section_is_made_replaced_and_never_half(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "PAGE.md"
    replace_section(page, "a", "first", title="Page")
    replace_section(page, "b", "other")
    page.write_text(page.read_text() + "\nby hand\n")
    replace_section(page, "a", "second")
    text = page.read_text()
    assert text.startswith("# Page\n\n<!-- a -->\nsecond\n<!-- /a -->\n\n<!-- b -->\nother\n")
    assert "first" not in text
    assert text.endswith("by hand\n")
    page.write_text(text.replace("<!-- /a -->", ""))
    with pytest.raises(ValueError, match="only one of the marks"):
        replace_section(page, "a", "third")


def test_depths_of_a_model_too_small_for_them_are_refused() -> None:
    tiny: dict[str, Any] = {"vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 2}
    config = config_from_dict({"model": tiny | {"n_kv_heads": 1}, "data": {"tokenizer": "byte"}})
    with pytest.raises(ValueError, match="leave the row out"):
        resolve_rows(config, ["depth_18"])
    with pytest.raises(ValueError, match="leave head_dim_128 out"):
        resolve_rows(config, ["head_dim_128"])


def test_before_a_run_has_ended_its_pace_tells_how_long_all_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    progress = Progress(["baseline", "mha"], 2, workers=1)
    assert progress.eta_seconds() is None
    key = ("baseline", 0)
    progress.first[key], progress.running[key] = (100.0, 0.25), 0.26  # resumed at a quarter
    monkeypatch.setattr("time.monotonic", lambda: 160.0)
    assert progress.eta_seconds() is None
    progress.running[key] = 0.5
    assert progress.eta_seconds() == pytest.approx(3.5 * 60 / 0.25)


def test_away_from_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress(["baseline", "mha"], 2, workers=1)
    with StudyTerminal(interval=0.0) as display:
        display.show(progress)
        progress.done[("baseline", 0)] = "3.1415"
        progress.seconds.append(120.0)
        progress.running[("mha", 0)] = 0.5
        display.show(progress)
    with StudyTerminal(interval=60.0) as display:
        display.show(progress)
        display.show(progress)
        display.note("mha, seed 0: diverged")
    said = capsys.readouterr().err.splitlines()
    line = "1 of 4 runs ended; mha seed 0 50 %; about 5.0 min left"
    assert said == ["0 of 4 runs ended", line, line, "mha, seed 0: diverged"]
