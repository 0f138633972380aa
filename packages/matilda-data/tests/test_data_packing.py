"""Rows of whole documents: nothing lost, nothing cut that fits, documents kept apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matilda_data import BinStream, DataError, documents_of, open_dataset, prepare_text
from matilda_data.packing import pack_documents


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), capacity=st.integers(2, 30))
def test_every_token_but_the_first_is_a_target_once(lengths: list[int], capacity: int) -> None:
    ends = np.cumsum(lengths)
    packing = pack_documents(ends - lengths, int(ends[-1]), capacity)
    targets: list[int] = []
    firsts: list[int] = []
    for row in range(packing.n_rows):
        segments = packing.segments(row)
        assert 0 < sum(length for _, length in segments) <= capacity
        for start, length in segments:
            firsts.append(start)
            targets += range(start + 1, start + length)
    begins = set((ends - lengths).tolist())
    assert sorted(targets) == [i for i in range(ends[-1]) if i not in begins]
    assert begins <= set(firsts)
    whole = [
        (start, length)
        for start, length in zip(ends - lengths, lengths, strict=True)
        if length <= capacity
    ]
    made = set(zip(packing.starts.tolist(), packing.lengths.tolist(), strict=True))
    assert all((int(start), length) in made for start, length in whole)


def test_packing_is_golden_and_tight() -> None:
    lengths = np.array([5, 3, 8, 2, 6, 12, 1])
    ends = np.cumsum(lengths)
    packing = pack_documents(ends - lengths, int(ends[-1]), 8)
    rows = [packing.segments(row) for row in range(packing.n_rows)]
    assert rows == [[(8, 8)], [(24, 8)], [(16, 2), (18, 6)], [(0, 5), (36, 1)], [(5, 3), (31, 5)]]


@pytest.fixture
def data_dir(corpus: Path, tmp_path: Path) -> Path:
    prepare_text(corpus, tmp_path / "out", tokenizer="gpt2", shard_tokens=3000, val_fraction=0.2)
    return tmp_path / "out"


def test_packed_rows_hold_documents_apart(data_dir: Path) -> None:
    stream = BinStream(data_dir, seq_len=100, seed=1, rows="documents")
    dataset = open_dataset(data_dir)
    rows = stream.packed(0, stream.n_windows)
    assert rows.tokens.shape == (stream.n_windows, 101)
    assert (rows.tokens == stream.windows(0, stream.n_windows)).all()
    # One epoch has every token but the documents' first ones as a target.
    assert rows.loss_mask.sum() == dataset.n_tokens - dataset.n_documents
    inputs, targets = rows.tokens[:, :-1], rows.tokens[:, 1:]
    assert not (targets[rows.loss_mask] == dataset.eot_id).any()
    cuts = rows.cu_seqlens
    assert (cuts[0], cuts[-1]) == (0, inputs.size)
    assert (np.diff(cuts) > 0).all()
    assert set(range(0, inputs.size, 100)) <= set(cuts.tolist())
    inside = np.ones(inputs.size, dtype=bool)
    inside[cuts[:-1]] = False
    assert not (inputs.reshape(-1)[inside & rows.loss_mask.reshape(-1)] == dataset.eot_id).any()
    fill = (
        1
        - (
            rows.tokens.size
            - sum(
                length for row in range(stream.n_windows) for _, length in stream.segments(row)[1]
            )
        )
        / rows.tokens.size
    )
    assert fill > 0.9


def test_packed_rows_are_traced_and_resumed(data_dir: Path) -> None:
    stream = BinStream(data_dir, seq_len=100, seed=1, rows="documents")
    for sample in range(0, 2 * stream.n_windows, 5):
        spans = documents_of(stream, sample)
        tokens = stream.windows(sample, 1)[0]
        assert spans[0].first == 0
        assert [a.stop for a in spans[:-1]] == [b.first for b in spans[1:]]
        for span in spans:
            if span.document_token == 0:
                assert tokens[span.first] == stream.dataset.eot_id
    stream.take(3)
    state = stream.state_dict()
    again = BinStream(data_dir, seq_len=100, seed=1, rows="documents")
    again.load_state_dict(state)
    assert (again.take(9) == stream.take(9)).all()
    with pytest.raises(DataError, match="`rows`"):
        BinStream(data_dir, seq_len=100, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="`rows` is 'padded'"):
        BinStream(data_dir, seq_len=100, seed=1, rows="padded")


def test_windows_have_boundaries_too(data_dir: Path) -> None:
    stream = BinStream(data_dir, seq_len=50, seed=1)
    rows = stream.packed(0, 8)
    assert rows.loss_mask.all()
    starts = set(np.flatnonzero(rows.tokens[:, :-1].reshape(-1) == stream.dataset.eot_id).tolist())
    assert set(rows.cu_seqlens[:-1].tolist()) == starts | set(range(0, 400, 50))
