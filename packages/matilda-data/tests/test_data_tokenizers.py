"""The `byte` and `gpt2` tokenizers: identity, ids, round trips, parity of piecewise encoding."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import matilda_data.tokenizer as tokenizer_module
from matilda_data import DataError, load_tokenizer

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
    st.sampled_from(["a", "bc", " ", "  ", "\n", "\n\n", "\r\n", "\t", "1", "'s", "é", "!"])
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
