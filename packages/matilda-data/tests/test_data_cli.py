"""The console command and the README's examples."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from matilda_data import prepare_text
from matilda_data.cli import main
from matilda_data.terminal import CountLine

README = Path(__file__).parents[1] / "README.md"


def test_verify_and_info_print_the_data_id(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = prepare_text(corpus, tmp_path / "out", tokenizer="byte", val_fraction=0.2)
    for arguments in (["verify"], ["verify", "--deep"], ["info"]):
        assert main([*arguments, str(tmp_path / "out")]) == 0
        assert manifest.data_id in capsys.readouterr().out


def test_damage_is_one_sentence_and_exit_code_2(corpus: Path, tmp_path: Path) -> None:
    prepare_text(corpus, tmp_path / "out", tokenizer="byte", val_fraction=0.2)
    os.truncate(tmp_path / "out" / "text_train_000000.bin", 2000)
    done = subprocess.run(
        [sys.executable, "-m", "matilda_data.cli", "verify", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "text_train_000000.bin' is truncated" in done.stderr


def test_a_reader_that_stops_early_is_no_error(corpus: Path, tmp_path: Path) -> None:
    prepare_text(corpus, tmp_path / "out", tokenizer="byte", val_fraction=0.2)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "matilda_data.cli", "info", str(tmp_path / "out")],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)


def test_a_long_count_is_rewritten_on_a_terminal_and_gone_at_the_end() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        with CountLine("verified", stream) as count:
            count(1, 3)
            count._next = 0.0  # as if seconds had passed
            count(2, 3)
            count(3, 3)
    assert terminal.getvalue() == "\r\x1b[Kverified 2 of 3\r\x1b[K"
    assert pipe.getvalue() == "verified 2 of 3\n"
