"""`BinStream`: exact order, exact resume, elasticity, epochs, mixtures."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matilda_data import (
    BinStream,
    DataError,
    TextSource,
    batch_sha256,
    documents_of,
    load_tokenizer,
    open_bin,
    open_dataset,
    prepare_text,
)


@pytest.fixture(scope="module")
def data_dir(
    tmp_path_factory: pytest.TempPathFactory, corpus_maker: Callable[[Path, int], Path]
) -> Path:
    """One source in many small shards."""
    base = tmp_path_factory.mktemp("stream")
    corpus = corpus_maker(base / "corpus", 60)
    prepare_text(corpus, base / "out", tokenizer="byte", shard_tokens=1500, val_fraction=0.2)
    return base / "out"


@pytest.fixture(scope="module")
def mixed_dir(
    tmp_path_factory: pytest.TempPathFactory, corpus_maker: Callable[[Path, int], Path]
) -> Path:
    """Two sources, 83 and 17."""
    base = tmp_path_factory.mktemp("mixed")
    corpus = corpus_maker(base / "corpus", 60)
    prepare_text(
        [
            TextSource(name="edu", inputs=corpus / "a", weight=83),
            TextSource(name="code", inputs=corpus / "z.jsonl", weight=17),
        ],
        base / "out",
        tokenizer="byte",
        shard_tokens=2000,
        val_fraction=0.2,
    )
    return base / "out"


opened = functools.cache(open_dataset)


@pytest.mark.parametrize("rows", ["windows", "documents"])
def test_a_stream_goes_to_workers_that_are_not_forked(mixed_dir: Path, rows: str) -> None:
    stream = BinStream(mixed_dir, seq_len=16, seed=0, rows=rows)
    stream.take(5)
    expected = batch_sha256(stream.windows(3, 9))
    copy = pickle.loads(pickle.dumps(stream))
    assert (copy.next_sample, batch_sha256(copy.windows(3, 9))) == (5, expected)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert batch_sha256(pool.submit(stream.windows, 3, 9).result()) == expected


def test_a_damaged_shard_is_found_in_the_worker_too(mixed_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed_dir, tmp_path / "data")
    stream = BinStream(tmp_path / "data", seq_len=16, seed=0, weights={"edu": 1})
    stream.take(200)
    shard = stream.dataset.sources[0].shards[0].path
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match="is damaged in chunk 0"):
        pickle.loads(pickle.dumps(stream)).take(200)


def test_a_relative_directory_may_be_left_before_the_first_token_is_read(
    mixed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batch_sha256(BinStream(mixed_dir, seq_len=16, seed=0).take(5))
    monkeypatch.chdir(mixed_dir.parent)
    stream = BinStream(mixed_dir.name, seq_len=16, seed=0)
    plain = open_bin(
        sorted(map(str, Path(mixed_dir.name).glob("edu_train_*.bin"))), tokenizer="byte"
    )
    os.chdir(tmp_path)
    assert batch_sha256(stream.take(5)) == expected
    assert documents_of(stream, 0)
    assert BinStream(plain, seq_len=16, seed=0).take(2).shape == (2, 17)


def all_tokens(data_dir: Path, source: int = 0, split: str = "train") -> np.ndarray:
    dataset = open_dataset(data_dir, split)
    return dataset.sources[source].read(0, dataset.sources[source].n_tokens)


def test_golden_batch_pins_the_order_for_ever(data_dir: Path, mixed_dir: Path) -> None:
    assert open_dataset(data_dir).data_id == GOLDEN_DATA_ID
    stream = BinStream(data_dir, seq_len=64, seed=1234)
    assert batch_sha256(stream.windows(0, 50)) == GOLDEN_FIRST
    assert batch_sha256(stream.windows(10_000_000_000, 50)) == GOLDEN_FAR
    mixed = BinStream(mixed_dir, seq_len=64, seed=1234)
    assert batch_sha256(mixed.windows(123, 200)) == GOLDEN_MIXED


def test_every_window_comes_once_an_epoch(data_dir: Path) -> None:
    tokens = all_tokens(data_dir)
    stream = BinStream(data_dir, seq_len=37, seed=5)
    assert stream.n_windows == len(tokens) // 37
    ring = np.concatenate([tokens, tokens[:38]])
    for epoch in range(3):
        seen = stream.windows(epoch * stream.n_windows, stream.n_windows)
        _, starts = stream.positions(epoch * stream.n_windows, stream.n_windows)
        border = starts.min() % 37
        assert len(set(starts.tolist())) == stream.n_windows
        order = np.sort((starts - starts[0]) % len(tokens))
        assert (np.diff(order) % 37 == 0).sum() >= stream.n_windows - 2, border
        for row, start in zip(seen, starts.tolist(), strict=True):
            assert (row == ring[start : start + 38]).all()


def test_window_borders_move_between_epochs(data_dir: Path) -> None:
    stream = BinStream(data_dir, seq_len=37, seed=5)
    starts = [stream.positions(e * stream.n_windows, 1)[1][0] % 37 for e in range(12)]
    assert len(set(starts)) > 4


def test_other_seeds_and_epochs_give_other_orders(data_dir: Path) -> None:
    hashes = {
        batch_sha256(BinStream(data_dir, seq_len=64, seed=seed).windows(epoch * n, n))
        for n in [BinStream(data_dir, seq_len=64, seed=0).n_windows]
        for seed in range(4)
        for epoch in range(3)
    }
    assert len(hashes) == 12


def test_windows_cross_shards_seamlessly(data_dir: Path) -> None:
    tokens = all_tokens(data_dir)
    stream = BinStream(data_dir, seq_len=1700, seed=0, shuffle=False)  # longer than a shard
    for i, row in enumerate(stream.windows(0, stream.n_windows)):
        assert (row == tokens[i * 1700 : i * 1700 + 1701]).all()


def test_evaluation_order_is_sequential(mixed_dir: Path) -> None:
    stream = BinStream(mixed_dir, seq_len=16, seed=0, split="val", shuffle=False)
    rows = stream.windows(0, stream.n_windows)
    expected = []
    for source in range(2):
        tokens = all_tokens(mixed_dir, source, "val")
        expected += [tokens[i * 16 : i * 16 + 17] for i in range((len(tokens) - 1) // 16)]
    assert (rows == np.stack(expected)).all()
    assert (stream.windows(stream.n_windows, 3) == rows[:3]).all()


def test_targets_are_inputs_shifted_and_documents_begin_with_end_of_text(data_dir: Path) -> None:
    tokenizer = load_tokenizer("byte")
    rows = BinStream(data_dir, seq_len=32, seed=0, shuffle=False).windows(0, 2)
    assert rows[0, 0] == tokenizer.eot_id
    assert rows[0, -1] == rows[1, 0]


@given(first=st.integers(0, 10**12), count=st.integers(0, 40), cuts=st.lists(st.integers(0, 40)))
@settings(deadline=None, max_examples=40)
def test_any_cut_of_a_batch_is_the_same_batch(
    data_dir: Path, mixed_dir: Path, first: int, count: int, cuts: list[int]
) -> None:
    borders = sorted({0, count, *(cut for cut in cuts if cut < count)})
    for directory in (data_dir, mixed_dir):
        stream = BinStream(opened(directory), seq_len=23, seed=9)
        pieces = [stream.windows(first + a, b - a) for a, b in itertools.pairwise(borders)]
        whole = stream.windows(first, count)
        assert count == 0 or (np.concatenate(pieces) == whole).all()


@given(
    seed=st.integers(0, 2**63),
    steps=st.lists(
        st.tuples(
            st.sampled_from([24, 48, 120]), st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 3])
        ),
        min_size=1,
        max_size=5,
    ),
)
@settings(deadline=None, max_examples=15)
def test_any_world_size_and_micro_batch_sees_the_same_global_batches(
    mixed_dir: Path, seed: int, steps: list[tuple[int, int, int]]
) -> None:
    reference = BinStream(opened(mixed_dir), seq_len=15, seed=seed)
    state = reference.state_dict()
    for batch, world, micro in steps:  # batch size, world size and micro-batch change in mid-run
        ranks = []
        for _ in range(world):
            ranks.append(BinStream(opened(mixed_dir), seq_len=15, seed=seed))
            ranks[-1].load_state_dict(json.loads(json.dumps(state)))
        per_rank = batch // world
        rows = []
        for rank, stream in enumerate(ranks):
            begin = stream.next_sample + rank * per_rank
            for step in range(0, per_rank, micro):
                rows.append(stream.windows(begin + step, min(micro, per_rank - step)))
            stream.next_sample += batch
        assert batch_sha256(np.concatenate(rows)) == batch_sha256(reference.take(batch))
        state = ranks[-1].state_dict()
        assert state == reference.state_dict()


def test_resume_is_exact_at_any_position(data_dir: Path) -> None:
    stream = BinStream(data_dir, seq_len=20, seed=3)
    for _ in range(7):
        stream.take(13)
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = BinStream(data_dir, seq_len=20, seed=3)
        resumed.load_state_dict(state)
        assert resumed.next_sample == stream.next_sample
        assert (
            resumed.windows(resumed.next_sample, 5) == stream.windows(stream.next_sample, 5)
        ).all()


def test_state_is_small_and_plain(mixed_dir: Path) -> None:
    state = BinStream(mixed_dir, seq_len=20, seed=3).state_dict()
    assert len(json.dumps(state)) < 400
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("seed", {"seed": 4}),
        ("seq_len", {"seq_len": 21}),
        ("order", {"shuffle": False}),
        ("split", {"split": "val"}),
        ("mixture_sha256", {"weights": {"edu": 1}}),
    ],
)
def test_state_of_another_stream_is_refused_by_field(
    mixed_dir: Path, field: str, change: dict[str, object]
) -> None:
    base: dict[str, object] = {"seq_len": 20, "seed": 3}
    state = BinStream(mixed_dir, **base).state_dict()  # type: ignore[arg-type]
    other = BinStream(mixed_dir, **{**base, **change})  # type: ignore[arg-type]
    other.next_sample = 77
    with pytest.raises(DataError, match=f"the saved stream has `{field}`"):
        other.load_state_dict(state)
    assert other.next_sample == 77


def test_state_of_other_data_is_refused(data_dir: Path, mixed_dir: Path) -> None:
    state = BinStream(mixed_dir, seq_len=20, seed=3).state_dict()
    with pytest.raises(DataError, match="`data_id`"):
        BinStream(data_dir, seq_len=20, seed=3).load_state_dict(state)
    state = BinStream(data_dir, seq_len=20, seed=3).state_dict()
    with pytest.raises(DataError, match="`next_sample` -1"):
        BinStream(data_dir, seq_len=20, seed=3).load_state_dict({**state, "next_sample": -1})


def test_mixture_takes_sources_by_weight(mixed_dir: Path) -> None:
    stream = BinStream(mixed_dir, seq_len=20, seed=3)
    source, _ = stream.positions(0, 1000)
    assert np.bincount(source).tolist() == [830, 170]
    only = BinStream(mixed_dir, seq_len=20, seed=3, weights={"code": 1})
    assert only.n_windows == open_dataset(mixed_dir).sources[1].n_tokens // 20
    with pytest.raises(DataError, match="no source 'books' in the data set; it has edu, code"):
        BinStream(mixed_dir, seq_len=20, seed=3, weights={"books": 1})


def test_out_receives_the_tokens(data_dir: Path) -> None:
    stream = BinStream(data_dir, seq_len=20, seed=3)
    out = np.zeros((4, 21), dtype=np.uint16)
    assert stream.windows(8, 4, out=out) is out
    assert (out == stream.windows(8, 4)).all()
    with pytest.raises(DataError, match=r"`out` is int64\[4, 21\]; give uint16\[4, 21\]"):
        stream.windows(8, 4, out=np.zeros((4, 21), dtype=np.int64))  # type: ignore[arg-type]


def test_numpys_integers_are_integers(mixed_dir: Path) -> None:
    plain = BinStream(mixed_dir, seq_len=16, seed=3, weights={"edu": 2, "code": 1}, skip=[(1, 4)])
    numpys = BinStream(
        mixed_dir,
        seq_len=np.int64(16),
        seed=np.uint8(3),
        weights={"edu": np.int32(2), "code": np.int64(1)},
        skip=np.array([[1, 4]]),
        max_repeats=np.int64(50),
    )
    assert json.loads(json.dumps(numpys.state_dict())) == plain.state_dict()
    assert (numpys.take(40) == plain.take(40)).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"skip": (0, 10)}, r"`skip` holds 0; give a list of intervals"),
        ({"skip": [(1.5, 4)]}, r"`skip` is 1\.5; give an integer"),
        ({"weights": [1, 2]}, r"`weights` is \[1, 2\]; give a weight for each source"),
        ({"weights": "edu"}, r"`weights` is 'edu'; give a weight for each source"),
        ({"weights": [(0.5, {"edu": 1})]}, r"first sample` is 0\.5; give an integer"),
        ({"seq_len": 16.0}, r"`seq_len` is 16\.0; give an integer ≥ 1"),
    ],
)
def test_arguments_of_a_wrong_shape_are_named(
    mixed_dir: Path, arguments: dict[str, Any], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        BinStream(mixed_dir, **{"seq_len": 16, "seed": 0, **arguments})


def test_bad_arguments_are_refused(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`seq_len` is 0"):
        BinStream(data_dir, seq_len=0, seed=0)
    with pytest.raises(DataError, match="fewer than one sample"):
        BinStream(data_dir, seq_len=10**6, seed=0)
    stream = BinStream(data_dir, seq_len=10, seed=0)
    for first, count in ((-1, 4), (0, -1), (2**62, 1), (2**70, 1)):
        with pytest.raises(DataError, match=f"samples {first} to {first + count} do not exist"):
            stream.windows(first, count)
    for weights in ({}, {"text": 0}, []):
        with pytest.raises(DataError, match="take nothing"):
            BinStream(data_dir, seq_len=10, seed=0, weights=weights)
    with pytest.raises(ValueError, match="read-only"):
        stream.positions(0, 4)[1][0] = 7  # a view of what later batches are made of


def test_order_does_not_depend_on_the_directory(data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir, tmp_path / "moved")
    here = BinStream(data_dir, seq_len=20, seed=3).windows(0, 30)
    assert (BinStream(tmp_path / "moved", seq_len=20, seed=3).windows(0, 30) == here).all()


def test_batch_sha256_is_of_little_endian_uint16() -> None:
    import hashlib

    expected = hashlib.sha256(b"\x01\x00\x02\x00\x00\x01").hexdigest()
    assert batch_sha256([1, 2, 256]) == expected
    assert batch_sha256(np.array([[1, 2, 256]], dtype=">u2")) == expected


GOLDEN_DATA_ID = "5ee5450e1ba1873a6eda40a5fc8c0ccab1fe118f81b33972a3cf8817c486c08b"
GOLDEN_FIRST = "3fb992ecc545510246ed6df1626d502dc923a68411a6db09f38e0c2611373984"
GOLDEN_FAR = "a6151de579b2e9322bec529600f0ad681817f7bf343e80d1bcd392e711b5002b"
GOLDEN_MIXED = "9a048c83aa9bd61907707d07b1fa330b6372835bb6aec165996268be22e1d0a2"
