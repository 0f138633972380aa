"""The optional fast GPT-2 encoder: `fastokens`, used only while its ids equal tiktoken's.

Equality is checked on a fixed text when it is loaded and on one document of every batch after that.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["PARITY_TEXTS", "BatchEncoder", "load_fast_encoder"]

logger = logging.getLogger("matilda_data")

BatchEncoder = Callable[[Sequence[str]], tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]]
"""Texts to (flat uint16 ids, int64 length of each text)."""

PARITY_TEXTS = (
    "",
    " ",
    "Hello, world! It's 10:45 and we'll've said \"naïve café\" — don't they'RE I'm.",
    "tabs\t\tand\r\nlines \n\n  \n x   y\u00a0z\u3000w\u200b",
    "日本語のテキスト、русский текст, العربية, हिन्दी, ελληνικά 한국어 🧑‍🚀👍🏽 e\u0301 ﬁ ǅ",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # 0x1F 1e-9 ___init__\n" * 3,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 40 + "1234567890" * 30 + "=" * 300,
    "<|endoftext|> is text, <|fim|> too\0nul\x07bell \ufeffmark \U000f0000",
    "".join(chr(c) for c in range(32, 0x2000) if chr(c).isprintable()),
)


def load_fast_encoder(
    ranks: Mapping[bytes, int], splits: bytes, reference: BatchEncoder
) -> tuple[BatchEncoder | None, str]:
    """A checked fast encoder for GPT-2's `ranks`, or None and the reason why not."""
    try:
        fastokens = importlib.import_module("fastokens")
    except ImportError:
        return None, "fastokens is not installed (pip install 'matilda-data[fast]')"
    try:
        native = fastokens.Tokenizer.from_json_str(tokenizer_json(ranks, splits))
    except Exception as error:  # a native library may raise anything
        return None, f"fastokens cannot load the vocabulary ({error})"

    def encode(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        ids, offsets = native.encode_batch_flat(list(texts))
        ends = np.frombuffer(offsets, dtype="<u8").astype(np.int64)
        lengths = ends[1:] - ends[:-1]
        return np.frombuffer(ids, dtype="<u4").astype(np.uint16), lengths

    def checked(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        ids, lengths = encode(texts)
        if len(texts):
            probe = len(ids) % len(texts)
            start = int(lengths[:probe].sum())
            expected, _ = reference([texts[probe]])
            if not np.array_equal(ids[start : start + int(lengths[probe])], expected):
                logger.warning("fastokens differs from tiktoken on a document; tiktoken is used")
                return reference(texts)
        return ids, lengths

    (ids, lengths), (their_ids, their_lengths) = encode(PARITY_TEXTS), reference(PARITY_TEXTS)
    if not (np.array_equal(ids, their_ids) and np.array_equal(lengths, their_lengths)):
        return None, "fastokens gives other ids than tiktoken on the parity text"
    return checked, ""


def tokenizer_json(ranks: Mapping[bytes, int], splits: bytes) -> str:
    """GPT-2's `ranks` as a `tokenizer.json` of the `tokenizers` library.

    fastokens has a scanner of its own for the `ByteLevel` pre-tokenizer, which is GPT-2's pattern:
    four times the speed of the same pattern as a regular expression (docs/DATA.md). It wants
    merges, which `ranks` imply but slowly: byte i of `splits` is where the last merge of the i-th
    token of two bytes or more joins its halves.
    """
    letters = _byte_letters()
    vocabulary = {token.decode("latin-1").translate(letters): rank for token, rank in ranks.items()}
    words = sorted((word for word in vocabulary if len(word) > 1), key=vocabulary.__getitem__)
    merges = [f"{word[:cut]} {word[cut:]}" for word, cut in zip(words, splits, strict=True)]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {
                "type": "BPE",
                "vocab": vocabulary,
                "merges": merges,
            },
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


def _byte_letters() -> dict[int, int]:
    """GPT-2's printable character for each byte (Radford et al. 2019, `bytes_to_unicode`)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**dict(zip(plain, plain, strict=True)), **{b: 256 + i for i, b in enumerate(others)}}
