"""What a preparation refuses: one sentence, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zstandard

import matilda_data.inputs as inputs_module
from matilda_data import DataError, TextSource, prepare_text


def prepare(inputs: object, out: Path, **options: object) -> None:
    base = {"tokenizer": "byte", "val_fraction": 0.2, "workers": 1, "shard_tokens": 5000}
    prepare_text(inputs, out, **{**base, **options})  # type: ignore[arg-type]


def refuse(tmp_path: Path, inputs: object, match: str, **options: object) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=match) as caught:
        prepare(inputs, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before, "a refused preparation left something behind"


@pytest.mark.parametrize("name", ["exclude", "decontaminate", "merge"])
def test_one_name_where_a_list_is_meant_is_refused(corpus: Path, tmp_path: Path, name: str) -> None:
    # Its letters would be patterns, of which none may match: nothing were left out.
    refuse(tmp_path, corpus, rf"`{name}` is 'deep'; give a list, \['deep'\]", **{name: "deep"})


def test_a_pipe_is_refused_instead_of_waited_for(corpus: Path, tmp_path: Path) -> None:
    os.mkfifo(corpus / "a" / "pipe.txt")
    refuse(tmp_path, corpus, "pipe.txt' is a pipe, socket or device")


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    refuse(tmp_path, tmp_path / "in", "no documents: nothing to read")
    (tmp_path / "in" / "empty.txt").write_text("")
    refuse(tmp_path, tmp_path / "in", "no documents: every input is empty")
    refuse(tmp_path, tmp_path / "missing.txt", "matches no file")
    refuse(tmp_path, str(tmp_path / "*.txt"), "matches no file")
    refuse(tmp_path, [], "no documents")
    (tmp_path / "in" / "caf\udce9.txt").write_text("named in latin-1")
    refuse(tmp_path, tmp_path / "in", "name of input .* is not UTF-8")
    (tmp_path / "in" / "image.png").write_bytes(b"x")
    refuse(tmp_path, tmp_path / "in" / "image.png", "unknown type")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"{broken", "line 2 .*is not JSON"),
        (b"[1]", "line 2 .*has no string `text`"),
        (b'{"txt": "a"}', "line 2 .*has no string `text`"),
        (b'{"text": 5}', "line 2 .*has no string `text`"),
        (b'{"text": "\xff"}', "line 2 .*is not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', "line 2 .*lone surrogate"),
        (b"[" * 100_000, "line 2 .*is not JSON .too deeply nested"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 2 .*is not JSON .*4300"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, match: str) -> None:
    good = b'{"text": "good"}\n'
    (tmp_path / "b.jsonl").write_bytes(good + line + b"\n" + good)
    refuse(tmp_path, tmp_path / "b.jsonl", match)


def test_bad_line_that_a_worker_process_met_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", 1)  # a unit for each line
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n[1]\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=r"line 2 of .*b\.jsonl' has no string `text`"):
        prepare(tmp_path / "b.jsonl", tmp_path / "out", workers=2)


def test_undecodable_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    refuse(tmp_path, tmp_path / "latin.txt", "latin.txt' is not UTF-8 at byte 3")


def test_damaged_zstd_and_parquet_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    raw = zstandard.compress(b'{"text": "words and words"}\n' * 1000)
    (tmp_path / "cut.jsonl.zst").write_bytes(raw[:-5])
    refuse(tmp_path, tmp_path / "cut.jsonl.zst", "truncated")
    (tmp_path / "not.jsonl.zst").write_bytes(b"plain text")
    refuse(tmp_path, tmp_path / "not.jsonl.zst", "cannot decompress")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense PAR1")
    refuse(tmp_path, tmp_path / "bad.parquet", "as parquet")


def test_bad_options_are_refused(corpus: Path, tmp_path: Path) -> None:
    refuse(tmp_path, corpus, "unknown tokenizer 'gpt3'", tokenizer="gpt3")
    refuse(tmp_path, corpus, "`val_fraction` is 1.0", val_fraction=1.0)
    refuse(tmp_path, corpus, "`shard_tokens` is 5", shard_tokens=5)
    refuse(tmp_path, corpus, "`workers` is 0", workers=0)
    refuse(tmp_path, corpus, "`invalid_utf8` is 'ignore'", invalid_utf8="ignore")
    with pytest.raises(DataError, match="source name 'a/b'"):
        TextSource(name="a/b", inputs=corpus)
    with pytest.raises(DataError, match="weight 0"):
        TextSource(name="a", inputs=corpus, weight=0)
