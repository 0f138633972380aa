"""Which documents, and which sources, samples are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from matilda_data.dataset import TokenSource
from matilda_data.errors import DataError
from matilda_data.stream import BinStream
from matilda_data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["DocumentSpan", "documents_of", "sources_of"]

MOST_SOURCES = 12
OTHERS = "others"


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
    number, segments = stream.segments(sample)
    source = next(s for s in stream.dataset.sources if s.name == stream.source_names[number])
    if source.index is None:
        raise DataError(
            f"source {source.name!r} has no document index; import its shards with: "
            "matilda-data convert"
        )
    tokens = stream.windows(sample, 1)[0]
    tokenizer = load_tokenizer(stream.dataset.tokenizer_name)
    spans: list[DocumentSpan] = []
    first = 0
    for start, length in segments:
        spans += _spans(source, tokens, start, first, first + length, tokenizer)
        first += length
    return spans


def sources_of(
    stream: BinStream, first: int, count: int, *, most: int = MOST_SOURCES
) -> tuple[list[str], npt.NDArray[np.int16]]:
    """Names, and int16[count, seq_len + 1] numbers into them for the tokens of samples.

    The names are those of the data set's sources or, where it has only one, the `source` fields of
    its documents' own records: the `most` with the most tokens here, all further ones `"others"`.
    Rows of packed documents are told apart by source alone.
    """
    names = list(stream.source_names)
    numbers, starts = stream.positions(first, count)
    rows = np.broadcast_to(numbers[:, None].astype(np.int16), (count, stream.seq_len + 1))
    source = next(s for s in stream.dataset.sources if s.name == names[0])
    if len(names) > 1 or source.index is None or stream.rows != "windows":
        return names, rows.copy()
    position = (starts[:, None] + np.arange(stream.seq_len + 1)) % source.n_tokens
    document = np.searchsorted(source.index.starts(), position, side="right") - 1
    here, place, tokens = np.unique(document, return_inverse=True, return_counts=True)
    origins = [source.index.entry(int(number)).origin or source.name for number in here]
    totals: dict[str, int] = {}
    for origin, n in zip(origins, tokens.tolist(), strict=True):
        totals[origin] = totals.get(origin, 0) + n
    kept = sorted(totals, key=lambda origin: (-totals[origin], origin))
    if len(kept) > most:
        kept = [*kept[:most], OTHERS]
    number_of = {origin: number for number, origin in enumerate(kept)}
    groups = np.array([number_of.get(origin, len(kept) - 1) for origin in origins], dtype=np.int16)
    return kept, groups[place.reshape(document.shape)]


def _spans(
    source: TokenSource,
    tokens: npt.NDArray[np.uint16],
    position: int,
    first: int,
    end: int,
    tokenizer: Tokenizer,
) -> list[DocumentSpan]:
    """The documents of `tokens[first:end]`, which lie in the source from `position` on."""
    spans: list[DocumentSpan] = []
    assert source.index is not None
    while first < end:
        document = source.index.entry(source.index.document_at(position))
        stop = min(first + document.stop - position, end)
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
