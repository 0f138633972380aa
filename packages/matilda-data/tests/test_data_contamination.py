"""Documents that share a run of 13 words with an evaluation item are dropped and reported."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from matilda_data import DataError, measure_overlap, prepare_text, verify
from matilda_data.cli import main
from matilda_data.contamination import EvaluationSet, build_evaluation_set, new_word_hashes
from matilda_data.rolling import run_hashes

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
    bad.write_text('{"a": 1}\n\n{"a": \n')
    for path, match in ((bad, r"line 3 of .*bad\.jsonl"), (tmp_path / "no.jsonl", "cannot read")):
        with pytest.raises(DataError, match=match):
            prepare_text(corpus, tmp_path / "out", tokenizer="byte", decontaminate=[path])
    assert not (tmp_path / "out").exists()


def runs_of_words(text: str, words: int) -> list[tuple[str, ...]]:
    """The rule itself, word by word."""
    found = re.findall(r"[^\W_]+", text.lower())
    return [tuple(found[i : i + words]) for i in range(len(found) - words + 1)]


PIECES = [
    "a",
    "B",
    "Ab",
    "7",
    "é",
    "É",
    "ß",
    "Σ",
    "ς",
    "σ",
    "İ",
    "i̇",
    "ǅ",
    "日本",
    "\U0001d400",
    "²",
]
GAPS = [" ", "  ", "\n", "_", "-", "’", "\u0301", "\u200b", ". ", "\0", "😀"]


@given(st.lists(st.sampled_from(PIECES + GAPS), max_size=40).map("".join))
@example("")
@example("___")
@example("ΑΣ ας")
def test_rolling_hashes_are_equal_exactly_where_runs_of_words_are(text: str) -> None:
    expected = runs_of_words(text, 3)
    hashes = run_hashes(text, 3).tolist()
    assert len(hashes) == len(expected)
    assert len(set(zip(hashes, expected, strict=True))) == len(set(hashes)) == len(set(expected))


@given(
    st.lists(st.sampled_from(["a", "b", "C", "é"]), min_size=40, max_size=90),
    st.lists(st.sampled_from([" ", "\n", ", "]), min_size=1, max_size=5),
    st.integers(0, 30),
    st.integers(8, 20),
)
def test_matches_are_those_of_a_look_at_every_word(
    words: list[str], gaps: list[str], start: int, length: int
) -> None:
    texts = [
        "".join(word + gaps[i % len(gaps)] for i, word in enumerate(words)),
        " ".join(words[start : start + length]).upper(),
        "b " * 12,
    ]
    evaluation = _evaluation(
        [{"x": [texts[1], "short"]}, {"y": texts[2]}, {"z": "a b " * 9}, {"again": texts[1]}]
    )
    found = evaluation.matches(texts[0], new_word_hashes()).tolist()
    wanted = set(runs_of_words(texts[0], 13))
    items = [runs_of_words(text, 13) for text in (texts[1], texts[2], "a b " * 9, texts[1])]
    assert found == [number for number, runs in enumerate(items) if wanted & set(runs)]


def _evaluation(items: list[object]) -> EvaluationSet:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "eval.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        return build_evaluation_set([path])


def test_overlap_of_a_data_set_and_of_its_text_is_the_same(corpus: Path, tmp_path: Path) -> None:
    (corpus / "a" / "bad.txt").write_text(f"Ünter uns. {RUN.title()}, and so on.")
    (tmp_path / "other").mkdir()
    first, second = tmp_path / "test.jsonl.gz", tmp_path / "other" / "test.jsonl.gz"
    questions: list[object] = [{"id": "q7", "ctx": RUN}, {"id": "q8"}]
    others: list[object] = [{"x": "unrelated"}, {"ctx": [RUN]}]
    for path, items in ((first, questions), (second, others)):
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, items)).encode()))
    told: list[float] = []
    prepare_text(corpus, tmp_path / "out", tokenizer="gpt2", val_fraction=0.2, workers=1)
    reports = [measure_overlap([first, second], inputs=[corpus])]
    for split in ("train", "val"):
        reports.append(
            measure_overlap(
                [first, second],
                data_dir=tmp_path / "out",
                split=split,
                progress=lambda share, documents: told.append(share),
            )
        )
    assert told[-1] == 1.0
    searched = [report["searched"]["documents"] for report in reports]
    assert searched[0] == searched[1] + searched[2]
    found = [[(f["items_found"], f["ids"]) for f in report["files"]] for report in reports]
    assert found[0] == [(1, ["q7"]), (1, ["1"])]
    assert sorted(found[1:]) == [[(0, []), (0, [])], found[0]]  # its document is in one split
    assert reports[0]["documents"][0]["id"] == "a/bad.txt"
    assert "data_id" in reports[1]["searched"]


def test_overlap_needs_one_thing_to_look_through(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text("{}\n")
    for arguments in ({}, {"data_dir": tmp_path, "inputs": [tmp_path]}):
        with pytest.raises(DataError, match="either a data set or input files"):
            measure_overlap([path], **arguments)  # type: ignore[arg-type]


def test_the_overlap_command_counts_and_writes_what_it_found(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "a" / "bad.txt").write_text(RUN)
    path = tmp_path / "quiz_val.jsonl"
    path.write_text(json.dumps({"id": "q", "ctx": RUN}) + 2 * "\n{}" + "\n")
    out = tmp_path / "overlap.json"
    arguments = ["overlap", "--evals", str(path), "--input", str(corpus), "--json", str(out)]
    assert main(arguments) == 0
    assert "quiz_val.jsonl       1 of 3 items" in capsys.readouterr().out
    assert json.loads(out.read_text())["files"][0]["ids"] == ["q"]
    assert json.loads(out.read_text())["files"][0]["items_too_short"] == 2
    assert main(["overlap", "--evals", str(path)]) == 2
    # Hours of looking end in nothing when this is found only then.
    arguments[-1] = str(tmp_path / "nowhere" / "overlap.json")
    capsys.readouterr()
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"error: cannot write {arguments[-1]!r}: its directory does not exist\n"
    )


def test_one_path_where_a_list_is_meant_is_refused(tmp_path: Path) -> None:
    for arguments in ({"evaluations": "/e.jsonl"}, {"evaluations": [], "inputs": "/texts"}):
        with pytest.raises(DataError, match=r"give a list, \['/"):
            measure_overlap(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{}")])
def test_a_report_that_is_not_the_manifests_is_found_and_made_again(
    corpus: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    (corpus / "a" / "bad.txt").write_text(RUN)
    items = tmp_path / "first.jsonl"
    items.write_text(json.dumps({"q": RUN}) + "\n")
    out = tmp_path / "out"
    options = {"tokenizer": "byte", "val_fraction": 0.2, "decontaminate": [items]}
    prepare_text(corpus, out, **options)  # type: ignore[arg-type]
    report = (out / "contamination.json").read_bytes()
    verify(out, deep=True)
    damage(out / "contamination.json")
    with pytest.raises(DataError, match=r"contamination\.json"):
        verify(out, deep=True)
    prepare_text(corpus, out, **options)  # type: ignore[arg-type]
    assert (out / "contamination.json").read_bytes() == report
