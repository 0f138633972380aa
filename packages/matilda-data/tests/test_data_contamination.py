"""Documents that share a run of 13 words with an evaluation item are dropped and reported."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from matilda_data import DataError, prepare_text
from matilda_data.contamination import build_evaluation_set, new_word_hashes

RUN = "the quick brown fox jumps over the lazy dog and then it sleeps all day"


def test_runs_of_thirteen_words_match_and_twelve_do_not(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    items = [{"context": "Unrelated."}, {"choices": ["no", RUN], "label": 1}]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    evaluation = build_evaluation_set([path])
    words = RUN.split()

    def found(text: str) -> list[int]:
        return evaluation.matches(text, new_word_hashes()).tolist()

    assert found("Before, " + " ".join(words[:13]).upper() + "! After.") == [1]
    assert found("\n".join(words[2:15]) + ".") == [1]
    assert found(" ".join(words[:12]) + " other " + " ".join(words[12:])) == []
    assert found("") == []


def test_contaminated_documents_are_dropped_and_named(corpus: Path, tmp_path: Path) -> None:
    (corpus / "a" / "bad.txt").write_text(f"Some text. {RUN.title()}, and so on.")
    plain = tmp_path / "first.jsonl"
    plain.write_text(json.dumps({"q": "nothing of interest here"}) + "\n")
    packed = tmp_path / "second.jsonl.gz"
    items = [{"x": 1}, {"ctx": [RUN]}]
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, items)).encode()))
    options = {"tokenizer": "byte", "val_fraction": 0.2, "decontaminate": [plain, packed]}
    manifest = prepare_text(corpus, tmp_path / "out", workers=2, **options)  # type: ignore[arg-type]
    assert manifest.preparation["dropped"] == {"duplicates": 0, "empty": 0, "contaminated": 1}
    assert manifest.total_documents("train") + manifest.total_documents("val") == 60
    raw = (tmp_path / "out" / "contamination.json").read_bytes()
    assert manifest.preparation["contamination_report_sha256"] == hashlib.sha256(raw).hexdigest()
    report = json.loads(raw)
    assert report["documents"] == [
        {"source": "text", "id": "a/bad.txt", "items": ["second.jsonl.gz:2"]}
    ]
    assert [(f["name"], f["items"], f["items_found"]) for f in report["files"]] == [
        ("first.jsonl", 1, 0),
        ("second.jsonl.gz", 2, 1),
    ]


def test_evaluation_set_that_cannot_be_read_is_refused(corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n{"a": \n')
    for path, match in ((bad, r"line 2 of .*bad\.jsonl"), (tmp_path / "no.jsonl", "cannot read")):
        with pytest.raises(DataError, match=match):
            prepare_text(corpus, tmp_path / "out", tokenizer="byte", decontaminate=[path])
    assert not (tmp_path / "out").exists()
