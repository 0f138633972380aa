"""What the programs that prepare data share: options, exit codes, closing lines."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import matilda_data.inputs as inputs_module
from matilda_data import (
    DataError,
    Manifest,
    add_preparation_options,
    open_dataset,
    parse_weights,
    prepare_text,
    run_preparation,
    verify,
)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_preparation_options(parser, val_fraction=0.1)
    return parser.parse_args([*map(str, words), "--tokenizer", "byte"])


def test_whole_and_in_parts_print_the_same_data_id(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_preparation(prepare_text, parse("--out-dir", tmp_path / "a"), inputs=corpus) == 0
    whole = capsys.readouterr().out
    assert f"(data_id {open_dataset(tmp_path / 'a').data_id})" in whole
    for number in range(2):
        options = parse("--out-dir", tmp_path / f"p{number}", "--partition", f"{number}/2")
        assert run_preparation(prepare_text, options, inputs=corpus) == 0
        assert f"Part {number} of 2 is done" in capsys.readouterr().out
    options = parse("--out-dir", tmp_path / "b", "--merge", tmp_path / "p0", tmp_path / "p1")
    assert run_preparation(prepare_text, options, inputs=corpus) == 0
    assert capsys.readouterr().out == whole.replace(str(tmp_path / "a"), str(tmp_path / "b"))


def test_failures_are_one_sentence_and_an_exit_code(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse("--out-dir", tmp_path / "out")

    def stopped(**_: Any) -> Manifest:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not stopped")

    assert run_preparation(prepare_text, options, inputs=tmp_path / "none") == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert run_preparation(stopped, options) == 75
    assert "run the same command again to go on" in capsys.readouterr().err
    options = parse("--out-dir", corpus / "z.jsonl")
    assert run_preparation(prepare_text, options, inputs=corpus) == 2
    assert "Not a directory; choose another output directory" in capsys.readouterr().err


def test_a_data_set_without_held_out_text_is_not_called_ready(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse("--out-dir", tmp_path / "none", "--val-fraction", "0")
    assert run_preparation(prepare_text, options, inputs=corpus, following="train") == 0
    said = capsys.readouterr()
    assert "Next" not in said.out
    assert "has no held-out text" in said.err
    assert "`--val-fraction`, such as 0.1, into a new `--out-dir`" in said.err
    options = parse("--out-dir", tmp_path / "some")
    assert run_preparation(prepare_text, options, inputs=corpus, following="train") == 0
    said = capsys.readouterr()
    assert said.out.endswith("Next: train\n")
    assert "warning" not in said.err


def test_errors_name_the_option_rather_than_the_argument(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse("--out-dir", tmp_path / "out", "--val-fraction", "2")
    assert run_preparation(prepare_text, options, inputs=corpus) == 2
    assert "`--val-fraction` is 2.0" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    options = parse("--out-dir", tmp_path / "out")
    options.invalid_utf8 = "error"
    arguments = {"inputs": tmp_path / "latin.txt", "invalid_utf8": options.invalid_utf8}
    assert run_preparation(prepare_text, options, **arguments) == 2
    assert "set `--invalid-utf8` to 'replace'" in capsys.readouterr().err


def test_a_full_disk_is_named_and_space_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(**_: Any) -> Manifest:
        with Path("/dev/full").open("w") as file:  # as a disk: its error names no file
            file.write("x")
        raise AssertionError("not full")

    assert run_preparation(full, parse("--out-dir", tmp_path / "out")) == 4
    assert capsys.readouterr().err == (
        f"error: No space left on device: {str(tmp_path / 'out')!r}; free space there, then run "
        "the same command again to go on\n"
    )


IN_A_TERMINAL = """
import argparse, os, signal, sys, time
from matilda_data import add_preparation_options, run_preparation

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests themselves run under nohup

def prepare(**_):
    print("going", flush=True)
    while True:
        time.sleep(0.01)

os.close(os.open(os.ttyname(0), os.O_RDWR))  # this session's terminal, whose end is told to it
parser = argparse.ArgumentParser()
add_preparation_options(parser, val_fraction=0.1)
sys.exit(run_preparation(prepare, parser.parse_args(["--out-dir", "out"])))
"""


def test_a_terminal_that_is_gone_stops_a_preparation_like_sigterm() -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = os.read(ours, 1000)
    os.close(ours)
    assert process.wait(timeout=60) == 75
    assert b"going" in said


def test_under_nohup_a_preparation_outlives_its_terminal(tmp_path: Path) -> None:
    def going_on(**_: Any) -> Manifest:
        os.kill(os.getpid(), signal.SIGHUP)
        raise DataError("going on")

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run_preparation(going_on, parse("--out-dir", tmp_path / "out")) == 2


def test_disk_that_is_full_for_a_worker_is_one_sentence_and_the_rerun_goes_on(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", 30_000)
    options = parse("--out-dir", tmp_path / "out", "--workers", "2")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # workers inherit it
        assert run_preparation(prepare_text, options, inputs=corpus) == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert f"File too large: {str(tmp_path / 'out')!r}; run the same command again to go on" in said
    options.workers = 1
    assert run_preparation(prepare_text, options, inputs=corpus) == 0
    verify(tmp_path / "out", deep=True)


def test_weights_and_partitions_are_parsed_or_refused() -> None:
    assert parse_weights("prose=83,code=17") == {"prose": 83, "code": 17}
    for wrong in ("prose", "prose=much", "prose=1,", "a=1=2", ""):
        with pytest.raises(DataError, match="is not NAME=WEIGHT"):
            parse_weights(wrong)
    with pytest.raises(DataError, match="names a source twice"):
        parse_weights("a=1,a=2")
    with pytest.raises(SystemExit):
        parse("--out-dir", "x", "--partition", "half")
