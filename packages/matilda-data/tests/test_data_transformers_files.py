"""Exported tokenizer files give Matilda's ids, by the `tokenizers` library itself."""

from __future__ import annotations

import json

import pytest

from matilda_data import load_tokenizer, transformers_files

TEXTS = (
    "",
    "Hello, world!  It's 3 a.m.\n\n\tdef f(x):\n        return x ** 2\n",
    "Ελληνικά, 日本語, Здравствуйте, 1,024.5 °C, naïve café — “quotes” …",
    "\u00a0non-breaking\u2003space   \r\n  trailing   ",
    "emoji 🎉👩🏽‍🔬 and a\x00control\x1fcharacter",
)


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_ids_and_text_are_the_same(name: str) -> None:
    library = pytest.importorskip("tokenizers", reason="needs the tokenizers package")
    ours = load_tokenizer(name)
    files = transformers_files(ours, max_length=2048)
    theirs = library.Tokenizer.from_str(files["tokenizer.json"])
    assert theirs.get_vocab_size() == ours.vocab_size
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    marked = theirs.encode("<|endoftext|>The heart", add_special_tokens=False).ids
    assert marked == [ours.eot_id, *ours.encode("The heart").tolist()]


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_every_id_stands_for_its_bytes(name: str) -> None:
    ours = load_tokenizer(name)
    files = transformers_files(ours)
    description = json.loads(files["tokenizer.json"])
    vocabulary = description["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(ours.vocab_size - 1))
    assert description["added_tokens"][0]["id"] == ours.eot_id
    lengths = ours.token_byte_lengths
    assert all(len(word) == lengths[rank] for word, rank in vocabulary.items())
    merged = {merge.replace(" ", "") for merge in description["model"]["merges"]}
    assert merged == {word for word in vocabulary if len(word) > 1}
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<|endoftext|>"
