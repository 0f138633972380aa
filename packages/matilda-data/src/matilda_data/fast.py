"""The optional fast GPT-2 encoder: `fastokens`, used only while its ids equal tiktoken's.

Equality is checked on a fixed text when it is loaded and on one document of every batch after that.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

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
    ranks: bytes, pattern: str, reference: BatchEncoder
) -> tuple[BatchEncoder | None, str]:
    """A checked fast encoder for the tiktoken file `ranks`, or None and the reason why not."""
    try:
        fastokens = importlib.import_module("fastokens")
    except ImportError:
        return None, "fastokens is not installed (pip install 'matilda-data[fast]')"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ranks.tiktoken"
        path.write_bytes(ranks)
        try:
            native = fastokens.Tokenizer.from_tiktoken(
                str(path), pattern=pattern, special_tokens={}
            )
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
