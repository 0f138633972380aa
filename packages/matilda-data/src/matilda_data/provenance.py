"""Which documents a sample is made of, and the boundaries between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from matilda_data.errors import DataError
from matilda_data.stream import BinStream
from matilda_data.tokenizer import load_tokenizer

__all__ = ["DocumentSpan", "cu_seqlens", "documents_of"]


@dataclass(frozen=True, kw_only=True)
class DocumentSpan:
    """A run of a sample's tokens that belong to one document."""

    source: str
    """Source of the data set."""
    id: str
    """Document id."""
    origin: str
    """The record's own `source`, empty if it had none."""
    sha256: str
    """SHA-256 of the whole document's text."""
    shard: str
    """File with the run's first token."""
    shard_token: int
    """Position of that token in the shard."""
    first: int
    """The run is `sample[first:stop]`."""
    stop: int
    document_token: int
    """Tokens of the document before the run; 0 means that it begins with end-of-text here."""
    text: str
    """The run decoded; bytes of a character cut at an edge become U+FFFD."""


def documents_of(stream: BinStream, sample: int) -> list[DocumentSpan]:
    """The documents behind the tokens of `sample`, in order.

    Raises:
        DataError: the data has no document index (plain `.bin` files), or it is damaged.
    """
    number, start = (int(array[0]) for array in stream.positions(sample, 1))
    source = next(s for s in stream.dataset.sources if s.name == stream.source_names[number])
    if source.index is None:
        raise DataError(
            f"source {source.name!r} has no document index; import its shards with: "
            "matilda-data convert"
        )
    tokens = stream.windows(sample, 1)[0]
    tokenizer = load_tokenizer(stream.dataset.tokenizer_name)
    spans: list[DocumentSpan] = []
    position, first = start, 0
    while first < len(tokens):
        document = source.index.entry(source.index.document_at(position))
        stop = min(first + document.stop - position, len(tokens))
        shard, shard_token = source.locate(position)
        spans.append(
            DocumentSpan(
                source=source.name,
                id=document.id,
                origin=document.origin,
                sha256=document.sha256,
                shard=shard,
                shard_token=shard_token,
                first=first,
                stop=stop,
                document_token=position - document.start,
                text=tokenizer.decode(tokens[first:stop]),
            )
        )
        position = (position + stop - first) % source.n_tokens
        first = stop
    return spans


def cu_seqlens(inputs: npt.NDArray[np.uint16], eot_id: int) -> npt.NDArray[np.int32]:
    """Boundaries for attention inside documents, in the form of variable-length flash attention.

    Args:
        inputs: uint16[B, T] input tokens; row and document starts begin a sequence.
        eot_id: the token that begins each document.

    Returns:
        int32[n + 1]: sequence i is `inputs.reshape(-1)[cu[i] : cu[i + 1]]`; `cu[-1]` is B × T.
    """
    starts = inputs == eot_id
    starts[:, 0] = True
    return np.append(np.flatnonzero(starts.reshape(-1)), inputs.size).astype(np.int32)
