"""Global batches: one order for any number of ranks and micro-steps, with a hash that proves it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matilda_train.batches import BatchReader, chain_hash
from matilda_train.data_source import SyntheticStream

SEQ_LEN = 7


def make_reader(batch_size: int, rank: int = 0, world_size: int = 1) -> BatchReader:
    stream = SyntheticStream(vocab_size=60_000, seq_len=SEQ_LEN, seed=3)

    def windows(first: int, count: int) -> np.ndarray:
        return np.concatenate([stream.windows(first + i, 1) for i in range(count)])

    return BatchReader(windows, batch_size=batch_size, rank=rank, world_size=world_size)


@settings(max_examples=30, deadline=None)
@given(
    per_rank=st.integers(1, 6), world_size=st.sampled_from([1, 2, 3, 8]), first=st.integers(0, 99)
)
def test_ranks_together_hold_the_global_batch_in_order(
    per_rank: int, world_size: int, first: int
) -> None:
    batch_size = per_rank * world_size
    whole = make_reader(batch_size)
    parts = [make_reader(batch_size, rank, world_size) for rank in range(world_size)]
    try:
        expected = whole.read(first)
        shares = [part.read(first) for part in parts]
    finally:
        for reader in (whole, *parts):
            reader.close()
    assert torch.equal(torch.cat([share.tokens for share in shares]), expected.tokens)
    assert {share.sha256 for share in shares} == {expected.sha256}


@settings(max_examples=30, deadline=None)
@given(micro=st.integers(1, 9))
def test_micro_batches_are_shifted_by_one_and_keep_tokens_above_32767(micro: int) -> None:
    reader = make_reader(6)
    try:
        batch = reader.read(0)
    finally:
        reader.close()
    rows = list(batch.micro_batches(micro, torch.device("cpu")))
    inputs, targets = torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.shape == (6, SEQ_LEN)
    assert int(inputs.min()) >= 0
    assert int(inputs.max()) > 32_767
    assert all(len(r[0]) <= micro for r in rows)


@pytest.mark.parametrize("jump", [0, 4, 8, 40])
def test_prefetched_batch_is_forgotten_when_another_is_asked_for(jump: int) -> None:
    reader, fresh = make_reader(4), make_reader(4)
    try:
        reader.read(0)
        assert reader.read(jump).sha256 == fresh.read(jump).sha256
    finally:
        reader.close()
        fresh.close()


def test_prefetched_batch_of_another_size_is_forgotten() -> None:
    reader, fresh = make_reader(4), make_reader(4)
    try:
        assert len(reader.read(0, following=8).tokens) == 4
        again = reader.read(4, 2)
        assert len(again.tokens) == 2
        assert again.sha256 == fresh.read(4, 2).sha256
    finally:
        reader.close()
        fresh.close()


def test_error_of_the_reading_thread_reaches_the_caller() -> None:
    def windows(first: int, count: int) -> np.ndarray:
        if first > 0:
            raise OSError("shard is gone")
        return np.zeros((count, SEQ_LEN + 1), dtype=np.uint16)

    reader = BatchReader(windows, batch_size=2)
    try:
        reader.read(0)
        with pytest.raises(OSError, match="shard is gone"):
            reader.read(2)
    finally:
        reader.close()


def test_chain_hash_depends_on_every_batch_and_their_order() -> None:
    a, b = hashlib.sha256(b"a").digest(), hashlib.sha256(b"b").digest()
    start = "0" * 64
    assert chain_hash(chain_hash(start, a), b) != chain_hash(chain_hash(start, b), a)
    assert chain_hash(start, a) == hashlib.sha256(bytes(32) + a).hexdigest()
