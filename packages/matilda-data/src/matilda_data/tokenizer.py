"""Tokenizers that never touch the network: `byte` and `gpt2`."""

from __future__ import annotations

import base64
import difflib
import functools
import hashlib
import importlib.resources
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import tiktoken
import zstandard

from matilda_data.errors import DataError
from matilda_data.fast import BatchEncoder, load_fast_encoder

__all__ = ["TOKENIZERS", "Tokenizer", "load_tokenizer"]

TokenArray = npt.NDArray[np.uint16]

# The value that tiktoken itself pins for `r50k_base.tiktoken` (tiktoken_ext/openai_public.py).
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_EOT = 50256
BYTE_EOT = 256

BACKENDS = ("auto", "tiktoken", "fastokens")

# Longer texts are encoded in pieces of about this many characters, which bounds memory. tiktoken's
# regular expressions fail on a million spaces before a word, which pieces never have.
PIECE_CHARS = 1 << 19
# `\s` of those expressions: Unicode's White_Space, which is not quite Python's.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
CUT = re.compile(rf"(?<=[^{SPACE}])\n(?=[^{SPACE}])|[{SPACE}](?=[{SPACE}][^{SPACE}])")


class Tokenizer:
    """Text to uint16 ids and back.

    Attributes:
        name: `"byte"` or `"gpt2"`.
        vocab_size: number of ids, end-of-text included.
        eot_id: the end-of-text id, which begins each document of a shard.
        sha256: identity of the vocabulary, hexadecimal.
        pattern: pre-tokenization regular expression, empty for `byte`.
        token_byte_lengths: int32[vocab_size], UTF-8 bytes each id stands for (0 for end-of-text);
            bits per byte = total loss in nats / ln 2 / `token_byte_lengths[targets].sum()`.
    """

    def __init__(
        self,
        *,
        name: str,
        sha256: str,
        pattern: str,
        eot_id: int,
        token_bytes: list[bytes],
        encode_piece: Callable[[str], TokenArray],
        ranks: Mapping[bytes, int] | None = None,
        splits: bytes = b"",
    ) -> None:
        self.name = name
        self.sha256 = sha256
        self.pattern = pattern
        self.eot_id = eot_id
        self.vocab_size = len(token_bytes)
        self.token_byte_lengths: npt.NDArray[np.int32] = np.array(
            [len(token) for token in token_bytes], dtype=np.int32
        )
        self.token_byte_lengths.setflags(write=False)
        self._token_bytes = token_bytes
        self._encode_piece = encode_piece
        self._ranks = ranks
        self._splits = splits

    def identity(self) -> dict[str, str | int]:
        """What a manifest says of it."""
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "eot_id": self.eot_id,
            "sha256": self.sha256,
            "pattern": self.pattern,
        }

    def encode(self, text: str) -> TokenArray:
        """uint16[n] ids of `text`; special-token spellings in it are encoded as plain text.

        Raises:
            DataError: `text` holds lone surrogates, which have no UTF-8 form.
        """
        _check_utf8(text)
        if len(text) <= PIECE_CHARS:
            return self._encode_piece(text)
        return np.concatenate([self._encode_piece(piece) for piece in _pieces(text)])

    def batch_encoder(self, backend: str = "auto") -> tuple[BatchEncoder, str]:
        """A function from texts to (flat uint16 ids, int64 length of each), and what it runs on.

        Args:
            backend: `"tiktoken"`; `"fastokens"`; or `"auto"`, fastokens where it is installed and
                agrees with tiktoken. The ids are the same. `byte` has one way only, named itself.

        Raises:
            DataError: unknown, or fastokens is not installed or does not agree.
        """
        if backend not in BACKENDS:
            raise DataError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
        if self._ranks is None:
            return self._batched(self._one_by_one), self.name
        if backend != "tiktoken":
            fast, reason = load_fast_encoder(self._ranks, self._splits, self._one_by_one)
            if fast is not None:
                return self._batched(fast), "fastokens"
            if backend == "fastokens":
                raise DataError(f"backend 'fastokens' cannot be used: {reason}")
        return self._batched(self._one_by_one), "tiktoken"

    def _one_by_one(self, texts: Sequence[str]) -> tuple[TokenArray, npt.NDArray[np.int64]]:
        encoded = [self._encode_piece(text) for text in texts]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        return np.concatenate([np.empty(0, np.uint16), *encoded]), lengths

    def _batched(self, encode_pieces: BatchEncoder) -> BatchEncoder:
        """`encode_pieces` for texts of any length."""

        def encode(texts: Sequence[str]) -> tuple[TokenArray, npt.NDArray[np.int64]]:
            for text in texts:
                _check_utf8(text)
            groups = [_pieces(text) for text in texts]
            ids, lengths = encode_pieces([piece for group in groups for piece in group])
            ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            counts = np.cumsum([0, *(len(group) for group in groups)])
            return ids, np.diff(ends[counts])

        return encode

    def merges(self) -> tuple[Mapping[bytes, int], bytes]:
        """Ids of the byte strings without end-of-text, and where each one's last merge joins.

        Byte i of the second is the length of the left half of the i-th string of two bytes or more,
        by id. For `byte`: the 256 bytes, and nothing.
        """
        if self._ranks is None:
            return {bytes([value]): value for value in range(256)}, b""
        return self._ranks, self._splits

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """The UTF-8 bytes of `ids` (any integer array); end-of-text decodes to nothing.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        array = np.asarray(ids).reshape(-1).astype(np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            bad = array[(array < 0) | (array >= self.vocab_size)][0]
            raise DataError(f"token id {int(bad)} is outside tokenizer {self.name!r}'s vocabulary")
        return b"".join([self._token_bytes[i] for i in array.tolist()])

    def decode(self, ids: npt.ArrayLike) -> str:
        """`decode_bytes` as text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def __repr__(self) -> str:
        return f"Tokenizer(name={self.name!r}, vocab_size={self.vocab_size})"


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: `"byte"` (256 bytes + end-of-text) or `"gpt2"` (50,257 ids).

    The result is cached and shared. Nothing is downloaded: the GPT-2 vocabulary is part of this
    package and its SHA-256 is checked here.

    Raises:
        DataError: no such tokenizer, or the vocabulary file is damaged.
    """
    return _load(name)


@functools.cache
def _load(name: str) -> Tokenizer:
    build = TOKENIZERS.get(name)
    if build is None:
        near = difflib.get_close_matches(str(name), TOKENIZERS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(
            f"unknown tokenizer {name!r}{hint}; choose one of {', '.join(map(repr, TOKENIZERS))}"
        )
    return build()


def _byte_tokenizer() -> Tokenizer:
    def encode_piece(text: str) -> TokenArray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    return Tokenizer(
        name="byte",
        sha256=hashlib.sha256(
            b"matilda-data byte tokenizer: 256 bytes, end-of-text 256"
        ).hexdigest(),
        pattern="",
        eot_id=BYTE_EOT,
        token_bytes=[bytes([value]) for value in range(256)] + [b""],
        encode_piece=encode_piece,
    )


def _check_utf8(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")  # tiktoken would replace lone surrogates in silence
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has a lone surrogate at character {error.start} and no UTF-8 form"
        ) from None


def gpt2_ranks_file() -> bytes:
    """The shipped GPT-2 merge ranks in tiktoken form, checked against the hash tiktoken pins."""
    raw = _vocabulary_file("gpt2.tiktoken.zst")
    if hashlib.sha256(raw).hexdigest() != GPT2_RANKS_SHA256:
        raise DataError(
            "the GPT-2 vocabulary file inside matilda-data is damaged (its SHA-256 is not the one "
            "tiktoken pins for r50k_base); reinstall matilda-data"
        )
    return raw


def gpt2_splits() -> bytes:
    """For each token of two bytes or more, by rank, the length of its last merge's left half."""
    return _vocabulary_file("gpt2.splits.zst")


def _vocabulary_file(name: str) -> bytes:
    packed = importlib.resources.files("matilda_data").joinpath("vocab", name)
    try:
        return zstandard.ZstdDecompressor().decompress(packed.read_bytes())
    except (OSError, zstandard.ZstdError) as error:
        raise DataError(
            f"the GPT-2 vocabulary file {name!r} inside matilda-data cannot be read ({error}); "
            "reinstall matilda-data"
        ) from None


def _gpt2_tokenizer() -> Tokenizer:
    pairs = (line.split() for line in gpt2_ranks_file().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        # None on purpose: tiktoken 0.9's array path finds them in text whatever it is told.
        special_tokens={},
        explicit_n_vocab=GPT2_EOT,
    )
    token_bytes = [b""] * (GPT2_EOT + 1)
    for token, rank in ranks.items():
        token_bytes[rank] = token

    def encode_piece(text: str) -> TokenArray:
        ids = encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        return ids.astype(np.uint16)

    return Tokenizer(
        name="gpt2",
        sha256=GPT2_RANKS_SHA256,
        pattern=GPT2_PATTERN,
        eot_id=GPT2_EOT,
        token_bytes=token_bytes,
        encode_piece=encode_piece,
        ranks=ranks,
        splits=gpt2_splits(),
    )


def _pieces(text: str) -> list[str]:
    """Cut a long text where the ids cannot change.

    GPT-2's pattern never joins a newline with the non-space after it, and takes a run of spaces but
    for the last one as a piece, whether or not text follows. A text without such a place stays
    whole.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARS and (cut := CUT.search(text, start + PIECE_CHARS)):
        pieces.append(text[start : cut.end()])
        start = cut.end()
    if start < len(text):
        pieces.append(text[start:])
    return pieces


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"byte": _byte_tokenizer, "gpt2": _gpt2_tokenizer}
