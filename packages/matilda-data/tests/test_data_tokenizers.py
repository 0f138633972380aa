"""The `byte` and `gpt2` tokenizers: identity, ids, round trips, parity of piecewise encoding."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import matilda_data.fast as fast_module
import matilda_data.tokenizer as tokenizer_module
from matilda_data import DataError, load_tokenizer

SLOW = os.environ.get("MATILDA_SLOW") == "1"
NEEDS_FASTOKENS = pytest.mark.skipif(
    importlib.util.find_spec("fastokens") is None, reason="fastokens not installed"
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def test_byte_tokenizer_has_256_bytes_and_end_of_text() -> None:
    byte = load_tokenizer("byte")
    assert (byte.vocab_size, byte.eot_id) == (257, 256)
    assert byte.encode("aé").tolist() == [97, 195, 169]
    assert byte.token_byte_lengths.tolist() == [1] * 256 + [0]


def test_gpt2_has_the_published_ids() -> None:
    gpt2 = load_tokenizer("gpt2")
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    assert gpt2.encode("Hello, world!").tolist() == [15496, 11, 995, 0]
    assert gpt2.encode("").tolist() == []
    assert gpt2.token_byte_lengths[gpt2.encode("Hello world")].sum() == len("Hello world")
    assert gpt2.token_byte_lengths[50256] == 0


def test_gpt2_vocabulary_is_the_one_tiktoken_pins() -> None:
    source = pytest.importorskip("tiktoken_ext.openai_public")
    import inspect

    assert tokenizer_module.GPT2_RANKS_SHA256 in inspect.getsource(source.r50k_base)


def test_gpt2_vocabulary_licence_is_shipped() -> None:
    import importlib.resources

    vocab = importlib.resources.files("matilda_data") / "vocab"
    assert "MIT License" in (vocab / "gpt2.tiktoken.LICENSE").read_text()


@pytest.mark.parametrize("name", ["byte", "gpt2"])
@given(text=TEXTS)
def test_decode_inverts_encode(name: str, text: str) -> None:
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_byte_lengths[ids].sum() == len(text.encode())


def test_end_of_text_spelled_in_a_document_is_plain_text() -> None:
    gpt2 = load_tokenizer("gpt2")
    ids = gpt2.encode("a<|endoftext|>b")
    assert gpt2.eot_id not in ids
    assert gpt2.decode(ids) == "a<|endoftext|>b"


PIECES = st.lists(
    st.sampled_from(
        ["a", "bc", " ", "  ", "\n", "\n\n", "\r\n", "\t", "1", "'s", "é", "!", "\xa0", "\x1c"]
    )
)


@given(pieces=PIECES)
def test_long_text_in_pieces_has_the_same_ids(pieces: list[str]) -> None:
    text = "".join(pieces)
    gpt2 = load_tokenizer("gpt2")
    whole = gpt2.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARS", 3)
        assert gpt2.encode(text).tolist() == whole.tolist()
        assert "".join(tokenizer_module._pieces(text)) == text


def test_a_million_spaces_before_a_word_are_encoded() -> None:
    gpt2 = load_tokenizer("gpt2")
    text = "a" + " " * 1_100_000 + "word "  # tiktoken alone gives up on so many
    expected = [64, *[220] * 1_099_999, *gpt2.encode(" word ")]
    assert gpt2.encode(text).tolist() == expected
    assert gpt2.batch_encoder("tiktoken")[0]([text])[0].tolist() == expected


def test_unknown_tokenizer_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'gpt-2' \(did you mean 'gpt2'\?\)"):
        load_tokenizer("gpt-2")


def test_lone_surrogate_is_refused_not_replaced() -> None:
    for name in ("byte", "gpt2"):
        with pytest.raises(DataError, match="lone surrogate at character 1"):
            load_tokenizer(name).encode("a\ud800")


def test_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="token id 257"):
        load_tokenizer("byte").decode([1, 257])


def test_damaged_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "GPT2_RANKS_SHA256", hashlib.sha256(b"").hexdigest())
    with pytest.raises(DataError, match="damaged"):
        tokenizer_module.gpt2_ranks_file()


def last_merge(token: bytes, ranks: dict[bytes, int]) -> int:
    """Length of the left half in the merge that makes `token`, by playing the merges."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, 1 << 30) for a, b in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return len(parts[0])


def test_shipped_splits_are_those_that_the_ranks_imply() -> None:
    ranks = load_tokenizer("gpt2")._ranks
    assert ranks is not None
    tokens = [token for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    splits = tokenizer_module.gpt2_splits()
    assert len(splits) == len(tokens)
    for i in range(0, len(tokens), 1 if SLOW else 9):
        assert splits[i] == last_merge(tokens[i], ranks), tokens[i]


@NEEDS_FASTOKENS
def test_fastokens_gives_tiktokens_ids_next_to_every_kind_of_character() -> None:
    import fastokens

    gpt2 = load_tokenizer("gpt2")
    assert gpt2._ranks is not None
    native = fastokens.Tokenizer.from_json_str(
        fast_module.tokenizer_json(gpt2._ranks, tokenizer_module.gpt2_splits())
    )
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    draw = random.Random(5)
    if not SLOW:
        points = points[:0x500] + draw.sample(points, 3000)
    texts = [
        f"a{c}b {c} 1{c}2 {c}{c} .{c}!\n{c}\n\n {c} '{c}s's{c}  {c}x  {c}" for c in map(chr, points)
    ]
    kinds = [
        *" \n\t\r\u00a0\u3000\u2028\x0b\x85\u200b",
        *"abzé日1٣²Ⅷ.'-_\u0301ǅ",
        "'s",
        "'ll",
        "'S",
    ]
    for _ in range(200_000 if SLOW else 5000):
        texts.append("".join(draw.choices(kinds, k=draw.randrange(40))))
    ids, ends = native.encode_batch_flat(texts)
    expected, lengths = gpt2._one_by_one(texts)
    assert np.array_equal(np.diff(np.frombuffer(ends, "<u8").astype(np.int64)), lengths)
    assert np.array_equal(np.frombuffer(ids, "<u4"), expected)
