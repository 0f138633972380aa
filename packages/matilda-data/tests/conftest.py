"""Small corpora, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "thought", "of", "über", "日本", "naïve"]
WORDS += ["café", "12", "345", "don't", "we'll\n", "\n\n\t"]


def make_text(name: str, n_words: int) -> str:
    """Words drawn by SHA-256 of `name`: varied, and fixed for ever."""
    words = []
    for i in range(n_words):
        digest = hashlib.sha256(f"{name}/{i}".encode()).digest()
        words.append(WORDS[digest[0] % len(WORDS)] + ("" if digest[1] % 7 else f" {digest[2]}"))
    return " ".join(words) + "\n"


def write_corpus(directory: Path, n_documents: int = 60) -> Path:
    """A tree of .txt, .py and .jsonl files with `n_documents` documents."""
    (directory / "a" / "deep").mkdir(parents=True)
    third = n_documents // 3
    for i in range(third):
        (directory / "a" / f"{i:03d}.txt").write_text(make_text(f"txt{i}", 20 + 37 * i % 300))
    for i in range(third):
        (directory / "a" / "deep" / f"m{i:03d}.py").write_text(make_text(f"py{i}", 10 + 11 * i))
    lines = [
        json.dumps({"text": make_text(f"json{i}", 15 + 5 * i), "id": f"rec-{i}", "source": "made"})
        for i in range(n_documents - 2 * third)
    ]
    (directory / "z.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sixty documents in three kinds of file."""
    return write_corpus(tmp_path / "corpus")


@pytest.fixture(scope="session")
def text_maker() -> Callable[[str, int], str]:
    """`make_text`."""
    return make_text


@pytest.fixture(scope="session")
def corpus_maker() -> Callable[[Path, int], Path]:
    """`write_corpus`."""
    return write_corpus
