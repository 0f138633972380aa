"""Texts to token pairs, exactly as lm-evaluation-harness' `hf` model makes them.

A context and its continuation are encoded as one text and cut where the context's own encoding
ends; spaces that close a context go to the continuation; an empty context is end-of-text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from matilda_data import Tokenizer
from matilda_train.evals.scoring import Pair

__all__ = ["DatasetCoder", "TextCoder", "encode_pairs"]


class TextCoder(Protocol):
    """A tokenizer, as far as evaluation needs one."""

    @property
    def eot_id(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """Ids that stand for something; a model may have more, as padding."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; nothing is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


class DatasetCoder:
    """The tokenizer that a run's data set was made with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eot_id = tokenizer.eot_id
        self.vocab_size = tokenizer.vocab_size
        self._tokenizer = tokenizer
        self._encode, _ = tokenizer.batch_encoder("tiktoken")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids, lengths = self._encode(texts)
        flat, ends = ids.tolist(), lengths.cumsum().tolist()
        return [flat[end - n : end] for end, n in zip(ends, lengths.tolist(), strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


def encode_pairs(coder: TextCoder, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """The token pair of each (context, continuation)."""
    moved = [_move_spaces(context, continuation) for context, continuation in texts]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    ids_of = dict(zip(contexts, coder.encode(contexts), strict=True))
    wholes = coder.encode([context + continuation for context, continuation in moved])
    pairs = []
    for (context, _), whole in zip(moved, wholes, strict=True):
        given = ids_of[context]
        if context:
            pairs.append(Pair(given, whole[len(given) :]))
        elif whole[:1] == [coder.eot_id]:
            pairs.append(Pair(whole[:1], whole[1:]))
        else:
            pairs.append(Pair([coder.eot_id], whole))
    return pairs


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
