"""Task files: what their items ask, what their scores are, what is said of malformed ones."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matilda_data import load_tokenizer
from matilda_train.evals.contamination import Overlap, add_clean_scores
from matilda_train.evals.encoding import DatasetCoder, encode_pairs
from matilda_train.evals.scoring import Scores
from matilda_train.evals.task_files import known_tasks, read_task, read_tasks
from matilda_train.evals.task_scores import TaskScores, judge, plain_metrics

CHOICE = {"id": "a", "context": "Q: one?\nA:", "choices": ["yes", "no, never"], "label": 1}
PARTIAL = {"context": "", "contexts": ["He", "She"], "continuation": "ran.", "label": 0}
LAST_WORD = {"context": "I don't care about", "continuation": " signs"}


def write(path: Path, *items: dict[str, Any] | str) -> Path:
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_every_kind_of_item_becomes_what_the_harness_would_ask(tmp_path: Path) -> None:
    choice = read_task("q", write(tmp_path / "q.jsonl", CHOICE))
    assert choice.kind == "choices"
    assert choice.items[0].texts == (("Q: one?\nA:", " yes"), ("Q: one?\nA:", " no, never"))
    assert (choice.items[0].id, choice.items[0].lengths, choice.items[0].label) == ("a", (3, 9), 1)
    partial = read_task("w", write(tmp_path / "w.jsonl", PARTIAL))
    assert partial.kind == "contexts"
    assert partial.items[0].texts == (("He", " ran."), ("She", " ran."))
    last = read_task("l", write(tmp_path / "l.jsonl", LAST_WORD, LAST_WORD))
    assert last.kind == "continuation"
    assert last.items[1].texts == (("I don't care about", " signs"),)
    assert [item.id for item in last.items] == ["0", "1"]


def test_known_answers_give_known_scores(tmp_path: Path) -> None:
    items = [CHOICE, {**CHOICE, "label": 0}, CHOICE, CHOICE]
    task = read_task("q", write(tmp_path / "q.jsonl", *items))
    # " yes" and " no, never": by the sum the first wins, by the character the second.
    likelihoods = np.array([-3.0, -8.0] * 2 + [-9.0, -8.0, -4.0, -4.0])
    scores = judge(task, Scores(likelihoods, np.zeros(8, dtype=np.bool_)))
    assert scores.correct.tolist() == [False, True, True, False]  # the first of equals wins
    assert scores.correct_norm is not None
    assert scores.correct_norm.tolist() == [True, False, True, True]
    metrics = scores.metrics()
    assert metrics["acc"] == 0.5
    assert metrics["acc_stderr"] == pytest.approx(math.sqrt(0.5 * 0.5 / 3))
    assert (metrics["acc_norm"], metrics["items"]) == (0.75, 4)


def test_last_words_have_accuracy_and_perplexity(tmp_path: Path) -> None:
    task = read_task("l", write(tmp_path / "l.jsonl", LAST_WORD, LAST_WORD))
    scores = judge(task, Scores(np.array([-1.0, -3.0]), np.array([True, False])))
    metrics = scores.metrics()
    assert metrics["acc"] == 0.5
    assert metrics["perplexity"] == pytest.approx(math.exp(2))
    assert metrics["perplexity_stderr"] == pytest.approx(math.exp(2) * 1.0)
    assert "acc_norm" not in metrics
    lost = judge(task, Scores(np.array([-1e4, -1e4]), np.array([False, False])))
    assert plain_metrics(lost)["perplexity"] is None


def test_partial_scoring_has_no_normalised_accuracy(tmp_path: Path) -> None:
    task = read_task("w", write(tmp_path / "w.jsonl", PARTIAL))
    metrics = judge(task, Scores(np.array([-1.0, -2.0]), np.zeros(2, dtype=np.bool_))).metrics()
    assert metrics["acc"] == 1.0
    assert math.isnan(metrics["acc_stderr"])  # of one item nothing is known
    assert "acc_norm" not in metrics


def test_some_items_can_be_left_out() -> None:
    right = np.array([True, False, True])
    scores = TaskScores("sciq", ("a", "b", "c"), right, ~right)
    rest = scores.without({"c", "z"}, "sciq_clean")
    assert (rest.name, rest.ids, rest.correct.tolist()) == ("sciq_clean", ("a", "b"), [True, False])
    assert rest.correct_norm is not None
    assert rest.correct_norm.tolist() == [False, True]


@pytest.mark.parametrize(("found", "left"), [("", None), ("b", ("a", "c")), ("abc", None)])
def test_scores_without_the_items_found_are_told_where_some_are_found_and_some_left(
    found: str, left: tuple[str, ...] | None, tmp_path: Path
) -> None:
    task = read_task("q", write(tmp_path / "q.jsonl", *({**CHOICE, "id": name} for name in "abc")))
    scores = TaskScores("q", tuple("abc"), np.array([True, False, True]))
    overlap = Overlap({}, "", {task.sha256: tuple(found)}, {"q.jsonl": task.sha256}, {})
    told = add_clean_scores([task], [scores], overlap)
    assert told[0] is scores
    assert [(each.name, each.ids) for each in told[1:]] == ([("q_clean", left)] if left else [])


def test_a_task_is_found_by_its_name_the_test_split_first(tmp_path: Path) -> None:
    for name in ("arc_easy_val", "arc_easy_test", "own"):
        write(tmp_path / f"{name}.jsonl", {**CHOICE, "id": name})
    (tmp_path / "sciq_val.jsonl.gz").write_bytes(gzip.compress(json.dumps(CHOICE).encode()))
    tasks = read_tasks(tmp_path, ["arc_easy", "arc_easy_val", "own", "sciq"])
    assert [task.items[0].id for task in tasks] == ["arc_easy_test", "arc_easy_val", "own", "a"]
    assert known_tasks(tmp_path) == ["arc_easy", "own", "sciq"]


def test_a_limit_takes_the_first_items(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", *[{**CHOICE, "id": i} for i in range(5)], "not JSON")
    assert [item.id for item in read_task("q", path, limit=2).items] == ["0", "1"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "holds no items"),
        (["{"], "Line 1 .* is not JSON"),
        (["[1]"], "is no JSON object"),
        ([{**CHOICE, "label": 2}], "`label` from 0 to 1, but has 2"),
        ([{**CHOICE, "label": True}], "`label` from 0 to 1, but has True"),
        ([{**CHOICE, "label": None}], "`label`"),
        ([{**CHOICE, "choices": ["one"]}], "two texts or more as `choices`"),
        ([{**CHOICE, "choices": ["one", ""]}], "two texts or more as `choices`"),
        ([{**CHOICE, "choices": "yes"}], "two texts or more as `choices`"),
        ([{"choices": ["a", "b"], "label": 0}], "a text as `context`, but has None"),
        ([{**PARTIAL, "continuation": ""}], "a text as `continuation`"),
        ([{"context": "a"}], "a text as `continuation`, but has None"),
        ([CHOICE, LAST_WORD], "Line 2 .* has `continuation`, but the lines before it have"),
    ],
)
def test_a_malformed_file_is_described_in_one_sentence(
    lines: list[dict[str, Any] | str], said: str, tmp_path: Path
) -> None:
    write(tmp_path / "q.jsonl", *lines)
    with pytest.raises(ValueError, match=said) as caught:
        read_tasks(tmp_path, ["q"])
    assert "\n" not in str(caught.value)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(CHOICE).encode() * 50)
    for raw in (whole[:-20], b"plain text", whole[:15] + b"\0" * 20 + whole[35:]):
        (tmp_path / "q.jsonl.gz").write_bytes(raw)
        with pytest.raises(ValueError, match=r"Cannot read .*q\.jsonl\.gz"):
            read_tasks(tmp_path, ["q"])


def test_a_task_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    write(tmp_path / "piqa_val.jsonl", CHOICE)
    with pytest.raises(ValueError, match=r"'pika' is not among .* it has piqa"):
        read_tasks(tmp_path, ["pika"])
    with pytest.raises(ValueError, match="does not exist"):
        read_tasks(tmp_path / "none", ["piqa"])


def test_spaces_that_close_a_context_go_to_its_continuation() -> None:
    coder = DatasetCoder(load_tokenizer("byte"))
    pairs = encode_pairs(coder, [("ab \n", "c"), ("ab", " c"), ("", "c"), ("ab \n", "d")])
    texts = [(coder.decode(p.context), coder.decode(p.continuation)) for p in pairs]
    assert texts == [("ab", " \nc"), ("ab", " c"), ("", "c"), ("ab", " \nd")]
    assert list(pairs[2].context) == [coder.eot_id]
