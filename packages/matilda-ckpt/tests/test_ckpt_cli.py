"""The command line: tables for people, JSON for scripts, exit codes for both."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from matilda_ckpt import Checkpointer, DamagedError, Keep, VerifyReport, cli
from matilda_ckpt.catalog import Catalog
from matilda_ckpt.cli import main
from matilda_ckpt.comparison import compare
from matilda_ckpt.export import export
from matilda_ckpt.fs import Entry, OsFs
from matilda_ckpt.torture import suite


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    with Checkpointer(tmp_path / "checkpoints", keep=Keep(last=9)) as checkpoints:
        for step in (10, 20, 30):
            state = {"model": model, "loop": {"step": step, "tokens": 7}}
            checkpoints.save(step, state, metrics={"val_loss": 5.0 / step})
            with torch.no_grad():
                model.weight[1, 2] += 0.5
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main([str(a) for a in arguments])
    return status, capsys.readouterr().out


def damage(run_dir: Path) -> None:
    path = run_dir / "checkpoints/step-00000020/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ls_lists_newest_first_for_people_and_scripts(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = call(capsys, "ls", run_dir)
    assert status == 0
    assert out.splitlines()[1].startswith("step-00000030  30")
    assert "healthy" in out
    assert "val_loss=0.16667" in out
    status, out = call(capsys, "ls", "--json", run_dir / "checkpoints")
    assert [info["step"] for info in json.loads(out)] == [30, 20, 10]
    (run_dir / "checkpoints/step-00000010/COMMIT").unlink()
    status, out = call(capsys, "ls", run_dir)
    assert status == 1
    assert "`COMMIT` is missing" in out


def test_verify_names_the_damaged_tensor(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "verify", run_dir)[0] == 0
    damage(run_dir)
    status, out = call(capsys, "verify", run_dir)
    assert status == 1
    assert "damaged tensor" in out
    assert call(capsys, "verify", "--shallow", run_dir)[0] == 0
    one = run_dir / "checkpoints/step-00000020"
    status, out = call(capsys, "verify", "--json", one)
    assert (status, json.loads(out)[0]["ok"]) == (1, False)


def test_torture_works_in_a_directory_named_relatively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []

    def suite_of(work: Path, quick: bool) -> list[suite.Row]:
        places.append(work)
        return []

    for name in ("_model", "_seeded", "_syscalls", "_power_cuts"):
        monkeypatch.setattr(suite, name, suite_of)
    monkeypatch.chdir(tmp_path)
    suite.run_all(Path(), quick=True)
    assert {place.parent for place in places} == {tmp_path}


def test_verify_of_nothing_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no checkpoint to verify" in capsys.readouterr().err


def test_verify_of_a_live_run_does_not_count_what_it_retires_meanwhile(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cli.verify
    root = run_dir / "checkpoints"

    def verify(path: str, deep: bool = True) -> VerifyReport:
        if path.endswith("10"):
            shutil.rmtree(path)
        return real(path, deep)

    monkeypatch.setattr(cli, "verify", verify)
    status, out = call(capsys, "verify", "--json", run_dir)
    assert [found["state"] for found in json.loads(out)] == ["ok", "ok", "retired"]
    assert status == 0

    def quarantining(path: str, deep: bool = True) -> VerifyReport:
        if path.endswith("20"):
            damage(run_dir)
            (root / "quarantine").mkdir()
            (root / "step-00000020").rename(root / "quarantine/step-00000020-0a1b2c3d")
        return real(path, deep)

    monkeypatch.setattr(cli, "verify", quarantining)
    status, out = call(capsys, "verify", run_dir)
    assert (status, "DAMAGED" in out) == (1, True)


def test_ls_passes_over_what_retention_takes_away_while_it_looks(run_dir: Path) -> None:
    class Racing(OsFs):
        def listdir(self, path: str) -> list[Entry]:
            if path.endswith("step-00000010"):
                shutil.rmtree(path, ignore_errors=True)
            return super().listdir(path)

    found = Catalog(Racing(), str(run_dir / "checkpoints")).scan()
    assert [(info.step, info.problem) for info in found] == [(30, None), (20, None)]


def test_interrupt_ends_quietly_with_130(run_dir: Path) -> None:
    code = f"""
import sys
from matilda_ckpt import cli
from matilda_ckpt.catalog import Catalog
def interrupted(*_): raise KeyboardInterrupt
Catalog.verify = interrupted
sys.exit(cli.main(["verify", {str(run_dir)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_inspect_shows_tensors(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = call(capsys, "inspect", run_dir)
    assert status == 0
    assert "model/weight" in out
    assert "3×4" in out
    data = json.loads(call(capsys, "inspect", "--json", run_dir)[1])
    assert data["step"] == 30
    assert {t["name"]: t["shape"] for t in data["tensors"]}["model/weight"] == [3, 4]


def test_diff_names_tensors_and_values_that_differ(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (run_dir / f"checkpoints/step-000000{n}" for n in (10, 20))
    status, out = call(capsys, "diff", a, b)
    assert status == 1
    assert "model/weight" in out
    assert "1 of 12" in out
    assert "5.000e-01" in out
    assert "loop.step: 10 → 20" in out
    assert "model/bias" not in out
    assert call(capsys, "diff", a, a)[0] == 0
    data = json.loads(call(capsys, "diff", "--json", a, b)[1])
    assert data["tensors"][0]["max_abs"] == pytest.approx(0.5)


def test_diff_reads_only_the_tensors_that_differ(tmp_path: Path) -> None:
    same = torch.randn(1000)
    with Checkpointer(tmp_path, share_bytes=None) as checkpoints:
        for step in (1, 2):
            optimizer = {"m": [same, np.full(7, step)], "w": same, "n": np.float32(step)}
            state = {"model": {"w": same, "b": torch.ones(5) * step}, "optimizer": optimizer}
            checkpoints.save(step, state)
    paths = [tmp_path / f"step-0000000{step}" for step in (1, 2)]
    read: list[str] = []
    real = Catalog.read_one_tensor

    def counting(catalog: Catalog, name: str, m: Any, file: str, key: str, view: Any) -> None:
        read.append(key)
        real(catalog, name, m, file, key, view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Catalog, "read_one_tensor", counting)
        patch.setattr(Catalog, "read_tensors", None)  # whole files
        found = compare(*paths)
    assert sorted(read) == ["b", "b", "m.1", "m.1", "n", "n"]
    assert (found.equal_tensors, found.values) == (1, [])
    assert [(c.name, c.differing) for c in found.tensors] == [
        ("model/b", 5),
        ("optimizer/m.1", 7),
        ("optimizer/n", 1),
    ]
    file = tmp_path / "step-00000002/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match="damaged tensor 'b'"):
        compare(*paths)


def test_export_that_fails_leaves_nothing_and_names_the_file(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        assert main(["export", str(run_dir), str(place / "w.safetensors")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"File too large: '{place}/w.safetensors'" in capsys.readouterr().err
    assert list(place.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="nowhere/w"):
        export(run_dir / "checkpoints/step-00000030", place / "nowhere/w")


def test_gc_deletes_by_the_rule_and_dry_run_does_not(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = call(capsys, "gc", run_dir, "--last", 1, "--dry-run")
    assert (status, "would delete 1: step-00000010" in out) == (0, True)
    status, out = call(capsys, "gc", run_dir, "--last", 1, "--best", "val_loss:1:max", "--json")
    assert json.loads(out)["deleted"] == []
    call(capsys, "gc", run_dir, "--last", 1)
    assert not (run_dir / "checkpoints/step-00000010").exists()


@pytest.mark.parametrize("command", [("gc", "--last", "2"), ("repair",)])
def test_what_changes_a_directory_leaves_a_single_checkpoint_alone(
    run_dir: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    one = run_dir / "checkpoints/step-00000020"
    before = sorted(path.name for path in one.iterdir())
    assert main([command[0], str(one), *command[1:]]) == 2
    assert "is one checkpoint, and nothing may be added to it" in capsys.readouterr().err
    assert sorted(path.name for path in one.iterdir()) == before
    assert call(capsys, "verify", one)[0] == 0


def test_export_writes_plain_weights_once(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights.safetensors"
    assert call(capsys, "export", run_dir, out)[0] == 0
    loaded = load_file(out)
    assert loaded["weight"].shape == (3, 4)
    assert main(["export", str(run_dir), str(out)]) == 2
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []
    assert main(["export", str(run_dir), str(tmp_path / "x"), "--name", "loop"]) == 2
    assert "no tensor" in capsys.readouterr().err


def test_repair_quarantines_damage_and_clears_leftovers(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run_dir)
    (run_dir / "checkpoints/.tmp-step-1-x").mkdir()
    status, out = call(capsys, "repair", run_dir)
    assert status == 1
    assert "2 intact, 1 quarantined" in out
    assert call(capsys, "repair", run_dir)[0] == 0
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        "LOCK",
        "quarantine",
        "step-00000010",
        "step-00000030",
    ]


def test_mistakes_are_one_sentence_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ls", str(tmp_path / "nope")]) == 2
    assert capsys.readouterr().err.strip().endswith("is not a directory")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no intact checkpoint" in capsys.readouterr().err


def test_module_runs_and_ls_imports_no_torch(run_dir: Path) -> None:
    code = f"""
import sys
from matilda_ckpt.cli import main
status = main(["verify", {str(run_dir)!r}])
assert "torch" not in sys.modules
sys.exit(status)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "matilda_ckpt", "ls", str(run_dir)], check=True, capture_output=True
    )
    assert b"step-00000030" in done.stdout
