"""Whole documents packed into rows, best fit first: no document is cut that fits in a row.

Longer ones are cut into full rows that overlap by one token, so that every token but a document's
first is a target exactly once an epoch. Pieces go, longest first, into the row with the least room
that still takes them (best-fit decreasing). The same data always gives the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["PACKING", "PackedRows", "Packing", "describe_rows", "pack_documents"]

PACKING = "best-fit-decreasing/1"

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Which runs of a source's tokens make which row."""

    offsets: Int64Array
    """int64[rows + 1]: row i has segments `offsets[i]` to `offsets[i + 1] - 1`."""
    starts: Int64Array
    """int64[segments]: first token of each segment among the source's tokens."""
    lengths: Int64Array
    """int64[segments]: tokens of each segment."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def segments(self, row: int) -> list[tuple[int, int]]:
        """(first token, tokens) of each segment of a row, in order."""
        part = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return list(zip(self.starts[part].tolist(), self.lengths[part].tolist(), strict=True))


@dataclass(frozen=True)
class PackedRows:
    """Rows with what attention and loss need to keep documents apart."""

    tokens: npt.NDArray[np.uint16]
    """uint16[B, T + 1]; end-of-text fills what no segment takes."""
    cu_seqlens: npt.NDArray[np.int32]
    """int32[n + 1] boundaries over the B × T inputs end to end; padding is its own sequence."""
    loss_mask: npt.NDArray[np.bool_]
    """bool[B, T]: whether the target at that place continues its input's document."""


def pack_documents(document_starts: Int64Array, n_tokens: int, capacity: int) -> Packing:
    """Pack the documents that begin at `document_starts` into rows of `capacity` tokens.

    Args:
        document_starts: int64[documents], increasing, the first is 0.
        n_tokens: tokens in all.
        capacity: tokens of a row, at least 2.
    """
    lengths = np.diff(np.append(document_starts, n_tokens))
    stride = capacity - 1
    pieces = np.maximum(-(-(lengths - 1) // stride), 1)
    document = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = document_starts[document] + number * stride
    sizes = np.minimum(lengths[document] - number * stride, capacity)
    order = np.argsort(-sizes, kind="stable")

    row_of = np.empty(len(sizes), dtype=np.int64)
    room_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room they have
    rooms = 0  # bit r is set when some row has room for r tokens
    n_rows = 0
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = room_rows[room].pop()
            if not room_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, n_rows
            n_rows += 1
        row_of[piece] = row
        if left := room - size:
            room_rows[left].append(row)
            rooms |= 1 << left

    by_row = np.lexsort((np.arange(len(sizes)), row_of))
    counts = np.bincount(row_of, minlength=n_rows)
    return Packing(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        starts=starts[by_row].astype(np.int64),
        lengths=sizes[by_row].astype(np.int64),
    )


def describe_rows(
    tokens: npt.NDArray[np.uint16], segments: list[list[tuple[int, int]]]
) -> PackedRows:
    """Boundaries and loss mask for rows made of `segments`."""
    batch, width = tokens.shape
    seq_len = width - 1
    cuts: list[int] = []
    mask = np.zeros((batch, seq_len), dtype=np.bool_)
    for row, parts in enumerate(segments):
        begin = 0
        for _, length in parts:
            if begin < seq_len:
                cuts.append(row * seq_len + begin)
            mask[row, begin : begin + length - 1] = True
            begin += length
        if begin < seq_len:
            cuts.append(row * seq_len + begin)
    return PackedRows(tokens, np.array([*cuts, batch * seq_len], dtype=np.int32), mask)
