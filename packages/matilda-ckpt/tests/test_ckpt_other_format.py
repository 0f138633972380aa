"""A checkpoint that another version wrote is not damaged: it is named, and stays where it is."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from matilda_ckpt import Checkpointer, OtherFormatError, Scrubber, verify
from matilda_ckpt.cli import main


def rewrite(checkpoint: Path, *, manifest: str, commit: str) -> None:
    """Give both files a format of their own, with a seal that fits."""
    text = (checkpoint / "MANIFEST.json").read_text().replace('"matilda-ckpt/1"', f'"{manifest}"')
    (checkpoint / "MANIFEST.json").write_text(text)
    seal = json.loads((checkpoint / "COMMIT").read_text()) | {
        "format": commit,
        "manifest_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "manifest_size": len(text.encode()),
    }
    (checkpoint / "COMMIT").write_text(json.dumps(seal, separators=(",", ":")) + "\n")


@pytest.fixture
def two_saves(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"count": {"steps": step}})
    return tmp_path


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.name != "LOCK"}


def test_it_is_named_and_nothing_is_moved(
    two_saves: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = two_saves / "step-00000002"
    rewrite(newest, manifest="matilda-ckpt/9", commit="matilda-ckpt/9")
    before = entries(two_saves)
    said = "has format 'matilda-ckpt/9', and this version reads 'matilda-ckpt/1'"
    with Checkpointer(two_saves) as checkpoints:
        assert [info.other_format for info in checkpoints.list()] == [True, False]
        with pytest.raises(OtherFormatError, match=said):
            checkpoints.restore({"count": None})
        with pytest.raises(OtherFormatError, match=said):
            checkpoints.load_state()
        older = checkpoints.restore({"count": None}, step=1)
        assert older is not None
        assert older.state == {"count": {"steps": 1}}
    assert entries(two_saves) == before
    assert said in str(verify(newest).problem)
    assert main(["verify", str(two_saves)]) == 1
    assert said in capsys.readouterr().out


def test_scrubber_repair_and_shell_go_on_with_the_others(
    two_saves: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(two_saves) as checkpoints:
        checkpoints.save(3, {"count": {"steps": 3}})
    rewrite(two_saves / "step-00000003", manifest="matilda-ckpt/9", commit="matilda-ckpt/9")
    (two_saves / "step-00000001" / "count.json").write_text('{"steps":7}\n')
    scrubber = Scrubber(two_saves)
    assert len({scrubber.scrub_one() for _ in range(3)}) == 3
    assert {scrubber.scrub_one() for _ in range(3)} == set(scrubber.checked)
    assert (list(scrubber.damaged), list(scrubber.passed_over)) == (
        ["step-00000001"],
        ["step-00000003"],
    )
    assert len(caplog.records) == 2  # each once, in two rounds

    assert main(["ls", str(two_saves)]) == 1
    assert re.search(r"step-00000003 .* other format +checkpoint", capsys.readouterr().out)
    assert main(["verify", "--json", str(two_saves)]) == 1
    states = [found["state"] for found in json.loads(capsys.readouterr().out)]
    assert states == ["other format", "ok", "damaged"]
    assert main(["ls", str(two_saves / "step-00000003")]) == 1
    assert "other format" in capsys.readouterr().out

    assert main(["repair", str(two_saves)]) == 1
    said = capsys.readouterr().out
    assert "step-00000003 stays, not checked: " in said
    assert "1 intact, 1 quarantined, 1 not checked" in said
    assert {"step-00000002", "step-00000003"} <= entries(two_saves)
    assert not (two_saves / "step-00000001").exists()


@pytest.mark.parametrize(
    ("manifest", "commit"),
    [("matilda-ckpt/9", "matilda-ckpt/1"), ("matilda-ckpt/1", "matilda-ckpt/9")],
)
def test_a_flipped_bit_is_damage_all_the_same(two_saves: Path, manifest: str, commit: str) -> None:
    rewrite(two_saves / "step-00000002", manifest=manifest, commit=commit)
    with Checkpointer(two_saves) as checkpoints:
        restored = checkpoints.restore({"count": None})
    assert restored is not None
    assert restored.state == {"count": {"steps": 1}}
    assert (two_saves / "quarantine").is_dir()
