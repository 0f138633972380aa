"""Phases, skips, repeats, prefetch, provenance, plain `.bin` files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import matilda_data.documents_index as documents_index
from matilda_data import (
    BinStream,
    DataError,
    Prefetcher,
    TextSource,
    cu_seqlens,
    documents_of,
    load_tokenizer,
    open_bin,
    open_dataset,
    prepare_text,
    sources_of,
)
from matilda_data.manifest import ShardEntry
from matilda_data.skipping import SkipMap


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory, corpus_maker: Callable[[Path, int], Path]
) -> Path:
    """`corpus`, and its data set `out` of two sources."""
    base = tmp_path_factory.mktemp("features")
    corpus = corpus_maker(base / "corpus", 60)
    prepare_text(
        [
            TextSource(name="edu", inputs=corpus / "a", weight=83),
            TextSource(name="code", inputs=corpus / "z.jsonl", weight=17),
        ],
        base / "out",
        tokenizer="gpt2",
        shard_tokens=2000,
        val_fraction=0.2,
    )
    return base


def stream_of(base: Path, **options: object) -> BinStream:
    return BinStream(base / "out", **{"seq_len": 20, "seed": 3, **options})  # type: ignore[arg-type]


def test_phases_change_the_mixture_and_leave_the_past_alone(base: Path) -> None:
    plain = stream_of(base, weights={"edu": 83, "code": 17})
    phased = stream_of(base, weights=[(0, {"edu": 83, "code": 17}), (150, {"code": 1})])
    assert (plain.windows(0, 150) == phased.windows(0, 150)).all()
    source, _ = phased.positions(150, 50)
    assert {phased.source_names[number] for number in source} == {"code"}
    code_before = (plain.positions(0, 150)[0] == 1).sum()
    alone = stream_of(base, weights={"code": 1})
    assert (alone.windows(code_before, 50) == phased.windows(150, 50)).all()
    with pytest.raises(DataError, match="first mixture phase must start at sample 0"):
        stream_of(base, weights=[(5, {"edu": 1})])
    with pytest.raises(DataError, match="increasing"):
        stream_of(base, weights=[(0, {"edu": 1}), (0, {"code": 1})])


def test_skip_leaves_out_exactly_the_named_samples(base: Path) -> None:
    plain = stream_of(base).windows(0, 100)
    skipping = stream_of(base, skip=[(10, 20), (50, 53), (18, 22)])
    kept = [i for i in range(100) if not (10 <= i < 22 or 50 <= i < 53)]
    assert (skipping.windows(0, len(kept)) == plain[kept]).all()


@given(
    intervals=st.lists(
        st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: (pair[0], sum(pair))),
        max_size=6,
    )
)
def test_skip_map_is_the_list_of_kept_numbers(intervals: list[tuple[int, int]]) -> None:
    kept = [i for i in range(300) if not any(a <= i < b for a, b in intervals)]
    assert SkipMap(intervals).original(np.arange(150)).tolist() == kept[:150]


def test_skips_ahead_may_change_on_resume_and_skips_behind_may_not(base: Path) -> None:
    stream = stream_of(base, skip=[(4, 8)])
    stream.take(30)
    state = json.loads(json.dumps(stream.state_dict()))
    ahead = stream_of(base, skip=[(4, 8), (40, 50)])
    ahead.load_state_dict(state)
    assert (ahead.take(6) == stream.windows(30, 6)).all()
    assert (ahead.take(4) == stream.windows(46, 4)).all()
    for skip in ([], [(4, 9)], [(4, 8), (20, 21)]):
        with pytest.raises(DataError, match="only samples ahead of 30 can be skipped"):
            stream_of(base, skip=skip).load_state_dict(state)
    with pytest.raises(DataError, match=r"skip interval \(5, 5\)"):
        stream_of(base, skip=[(5, 5)])


def test_samples_left_out_on_the_way_are_those_of_a_skip(base: Path) -> None:
    stream = stream_of(base, skip=[(4, 8)])
    stream.windows(0, 40)  # its order is cached
    assert stream.original(0, 4) == (0, 4)
    assert stream.original(3, 2) == (3, 9)
    interval = stream.original(20, 5)
    assert interval == (24, 29)
    stream.leave_out(*interval)
    expected = stream_of(base, skip=[(4, 8), (24, 29)])
    assert (stream.windows(0, 40) == expected.windows(0, 40)).all()
    assert stream.state_dict() == expected.state_dict()


def test_max_repeats_refuses_the_first_sample_past_it(base: Path) -> None:
    stream = stream_of(base, weights={"code": 1}, max_repeats=2)
    last = 2 * stream.n_windows
    assert stream.windows(0, last).shape == (last, 21)
    with pytest.raises(DataError, match="source 'code' is used up after 2 epochs"):
        stream.windows(last, 1)
    assert stream.epochs(stream.n_windows) == {"code": 1.0}
    assert stream.epochs(0) == {"code": 0.0}
    plain = stream_of(base, shuffle=False, max_repeats=1)
    edu, code = plain._n_windows.tolist()
    assert plain.epochs(edu + 1) == {"edu": 1.0, "code": 1 / code}  # source after source
    plain.windows(0, plain.n_windows)
    with pytest.raises(DataError, match="the data is used up after 1 epochs"):
        plain.windows(plain.n_windows, 1)


def test_epochs_count_repetitions_by_source(base: Path) -> None:
    stream = stream_of(base)
    stream.take(200)
    source, _ = stream.positions(0, 200)
    for number, name in enumerate(stream.source_names):
        expected = (source == number).sum() / stream._n_windows[number]
        assert stream.epochs()[name] == pytest.approx(expected)


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetched_batches_are_the_stream(base: Path, depth: int) -> None:
    reference = stream_of(base)
    streams = [stream_of(base) for _ in range(2)]
    readers = [
        Prefetcher(stream, batch_size=6, rank=rank, world_size=2, depth=depth)
        for rank, stream in enumerate(streams)
    ]
    for step in range(20):
        whole = np.concatenate([next(reader) for reader in readers])
        assert (whole == reference.take(6)).all()
        if step == 12:  # moving the stream drops what was read ahead
            reference.next_sample = 3
            for stream in streams:
                stream.next_sample = 3
    assert streams[0].state_dict() == reference.state_dict()
    before = threading.active_count()
    for reader in readers:
        reader.close()
    assert threading.active_count() == before - 2


def test_prefetcher_state_counts_what_was_handed_out(base: Path) -> None:
    with Prefetcher(stream_of(base), batch_size=4) as batches:
        next(batches)
        next(batches)
        state = json.loads(json.dumps(batches.state_dict()))
        following = next(batches).copy()
    assert state["next_sample"] == 8
    with Prefetcher(stream_of(base), batch_size=4) as resumed:
        next(resumed)
        resumed.load_state_dict(state)
        assert (next(resumed) == following).all()


def test_prefetch_keeps_a_batch_for_depth_more(base: Path) -> None:
    stream = stream_of(base)
    with Prefetcher(stream, batch_size=4, depth=2) as batches:
        for moved in range(7):  # also when the stream is moved in between
            held = next(batches)
            copy = held.copy()
            stream.next_sample = 100 * moved
            next(batches)
            wait_until(lambda: batches._reader is not None and batches._reader._ready.full())
            assert (held == copy).all()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_prefetch_uses_the_buffers_it_is_given(base: Path) -> None:
    made: list[np.ndarray] = []

    def make_buffer(shape: tuple[int, int]) -> np.ndarray:
        made.append(np.zeros(shape, dtype=np.uint16))
        return made[-1]

    with Prefetcher(stream_of(base), batch_size=4, make_buffer=make_buffer) as batches:
        for _ in range(12):
            batch = next(batches)
            assert any(batch is buffer for buffer in made)


def test_prefetch_raises_what_reading_raised_at_its_place(base: Path) -> None:
    stream = stream_of(base, weights={"code": 1}, max_repeats=1)
    whole = stream.n_windows // 4
    with Prefetcher(stream, batch_size=4) as batches:
        for _ in range(whole):
            next(batches)
        for _ in range(2):
            with pytest.raises(DataError, match="used up"):
                next(batches)
    assert stream.next_sample == 4 * whole
    for world_size in (0, 3, 8, -2):
        with pytest.raises(DataError, match=f"cannot share batches of 4 as rank 0 of {world_size}"):
            Prefetcher(stream, batch_size=4, world_size=world_size)


def test_documents_of_a_sample_are_its_tokens(base: Path) -> None:
    tokenizer = load_tokenizer("gpt2")
    texts = {
        path.relative_to(base / "corpus" / "a").as_posix(): path.read_text()
        for path in (base / "corpus" / "a").rglob("*.*")
    }
    for line in (base / "corpus" / "z.jsonl").read_text().splitlines():
        record = json.loads(line)
        texts[record["id"]] = record["text"]
    stream = stream_of(base)
    for sample in range(0, 3 * stream.n_windows, 11):
        tokens = stream.windows(sample, 1)[0]
        spans = documents_of(stream, sample)
        assert [span.first for span in spans] == [0, *(span.stop for span in spans[:-1])]
        assert spans[-1].stop == 21
        for span in spans:
            text = texts[span.id]
            whole = [tokenizer.eot_id, *tokenizer.encode(text).tolist()]
            length = span.stop - span.first
            assert span.sha256 == hashlib.sha256(text.encode()).hexdigest()
            assert span.origin == ("made" if span.source == "code" else "")
            run = whole[span.document_token : span.document_token + length]
            assert tokens[span.first : span.stop].tolist() == run
            shard = (base / "out" / span.shard).read_bytes()
            at = 1024 + 2 * span.shard_token
            assert int.from_bytes(shard[at : at + 2], "little") == run[0]


def test_tracing_a_sample_reads_the_indexes_of_its_documents_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(60):
        # Some documents fill several shards, in which none begins then.
        size = 5000 if number % 20 == 7 else 90 + 17 * number
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"{number:02d}" + "x" * size)
    prepare_text(
        tmp_path / "in", tmp_path / "out", tokenizer="byte", shard_tokens=1024, val_fraction=0
    )
    dataset = open_dataset(tmp_path / "out")
    (source,) = dataset.sources
    assert len(source.shards) > 40
    assert source.index is not None
    starts = source.index.starts()
    ends = np.append(starts[1:], source.n_tokens)
    for position in range(0, source.n_tokens, 61):
        number = source.index.document_at(position)
        assert number == np.searchsorted(starts, position, side="right") - 1
        entry = source.index.entry(number)
        assert (entry.number, entry.id) == (number, f"{number:02d}.txt")
        assert (entry.start, entry.stop) == (starts[number], ends[number])

    opened: list[int] = []
    read_index = documents_index.read_index

    def counted(directory: Path, entry: ShardEntry) -> object:
        opened.append([shard.path.name for shard in source.shards].index(entry.file))
        return read_index(directory, entry)

    monkeypatch.setattr(documents_index, "read_index", counted)
    order = BinStream(dataset, seq_len=100, seed=0)
    alone = 0
    for sample in range(0, order.n_windows, 7):
        first = int(order.positions(sample, 1)[1][0])
        if first + 101 > source.n_tokens:
            continue  # it wraps round
        opened.clear()
        stream = BinStream(tmp_path / "out", seq_len=100, seed=0)
        spans = documents_of(stream, sample)
        here = np.flatnonzero((starts < first + 101) & (ends > first))
        assert len(spans) == len(here)
        borders = {*starts[here].tolist(), *(ends[here] % source.n_tokens).tolist(), first}
        assert set(opened) <= {border // 1024 for border in borders}
        assert len(opened) == len(set(opened)), "each is read once"
        alone += len(opened) == 1
    assert alone > 10


def test_cu_seqlens_cut_at_rows_and_documents() -> None:
    inputs = np.array([[9, 1, 9, 9], [1, 2, 3, 9]], dtype=np.uint16)
    assert cu_seqlens(inputs, 9).tolist() == [0, 2, 3, 4, 7, 8]
    assert (inputs == [[9, 1, 9, 9], [1, 2, 3, 9]]).all()


def write_plain_bin(path: Path, tokens: np.ndarray) -> None:
    """As llm.c's `write_datafile` does."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    with path.open("wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(np.uint16).tobytes())


def test_plain_bins_stream_without_a_manifest(tmp_path: Path) -> None:
    tokens = np.arange(5000) % 50257
    write_plain_bin(tmp_path / "a_train_000001.bin", tokens[:3000])
    write_plain_bin(tmp_path / "a_train_000002.bin", tokens[3000:])
    paths = sorted(tmp_path.glob("*.bin"))
    dataset = open_bin(paths)
    assert dataset.sources[0].read(2990, 20).tolist() == list(range(2990, 3010))
    state = BinStream(dataset, seq_len=10, seed=0).state_dict()
    tokens[7] = 1
    write_plain_bin(tmp_path / "a_train_000001.bin", tokens[:3000])
    with pytest.raises(DataError, match="`data_id`"):
        BinStream(open_bin(paths), seq_len=10, seed=0).load_state_dict(state)
    with pytest.raises(DataError, match="no document index"):
        documents_of(BinStream(dataset, seq_len=10, seed=0), 0)


def test_our_shards_open_as_plain_bins_and_are_checked(base: Path, tmp_path: Path) -> None:
    shard = tmp_path / "s.bin"
    shutil.copy(base / "out" / "edu_train_000000.bin", shard)
    assert open_bin(shard).n_tokens == 2000
    with pytest.raises(DataError, match="was not made with tokenizer 'byte'"):
        open_bin(shard, tokenizer="byte")
    raw = bytearray(shard.read_bytes())
    raw[1024 + 99] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=r"s\.bin' is damaged"):
        open_bin(shard)
    os.truncate(shard, 2000)
    with pytest.raises(DataError, match="truncated"):
        open_bin(shard)
    write_plain_bin(shard, np.array([60000]))
    with pytest.raises(DataError, match="token id 60000"):
        open_bin(shard)


def test_stamps_save_hashing_and_are_dropped_at_any_touch(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matilda_data.stamps as stamps_module

    monkeypatch.setattr(stamps_module, "RACY_NS", -1)
    out = tmp_path / "out"
    shutil.copytree(base / "out", out)
    dataset = open_dataset(out)
    assert not any(shard.verified for source in dataset.sources for shard in source.shards)
    dataset.verify_ahead().join()
    assert all(shard.verified for source in dataset.sources for shard in source.shards)
    again = open_dataset(out)
    assert all(shard.verified for source in again.sources for shard in source.shards)
    distrustful = open_dataset(out, stamps=False)
    assert not any(shard.verified for source in distrustful.sources for shard in source.shards)

    shard = out / "edu_train_000001.bin"
    before = shard.stat()
    while (out / "probe").touch() or (out / "probe").stat().st_ctime_ns <= before.st_ctime_ns:
        pass  # until the clock of the file system moves on
    raw = bytearray(shard.read_bytes())
    raw[1024 + 50] ^= 4
    shard.write_bytes(raw)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # mtime restored, ctime cannot be
    with pytest.raises(DataError, match=r"edu_train_000001\.bin' is damaged in chunk 0"):
        open_dataset(out).sources[0].read(2000, 10)


def test_young_files_get_no_stamp(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matilda_data.stamps as stamps_module

    monkeypatch.setattr(stamps_module, "RACY_NS", 10**13)
    out = tmp_path / "out"
    shutil.copytree(base / "out", out, ignore=shutil.ignore_patterns(".verified.json"))
    for source in open_dataset(out).sources:
        source.read(0, source.n_tokens)
    assert not (out / ".verified.json").exists()


def test_flipped_bit_anywhere_in_the_stamp_voids_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matilda_data.stamps as stamps_module

    monkeypatch.setattr(stamps_module, "RACY_NS", -1)
    out = tmp_path / "out"
    shutil.copytree(base / "out", out)
    open_dataset(out).verify_ahead().join()
    stamp = out / ".verified.json"
    pristine = stamp.read_bytes()
    for position in range(0, len(pristine), 11):
        raw = bytearray(pristine)
        raw[position] ^= 1 << position % 7
        stamp.write_bytes(raw)
        assert not any(shard.verified for s in open_dataset(out).sources for shard in s.shards)
    # A good stamp of another directory vouches for nothing here.
    shutil.copytree(out, tmp_path / "copy")
    stamp.write_bytes(pristine)
    shutil.copy(stamp, tmp_path / "copy")
    copied = open_dataset(tmp_path / "copy")
    assert not any(shard.verified for source in copied.sources for shard in source.shards)


def test_forged_stamp_does_not_deceive_deep_verification(base: Path, tmp_path: Path) -> None:
    import matilda_data.stamps as stamps_module
    from matilda_data import verify
    from matilda_data.manifest import canonical_json, read_manifest

    out = tmp_path / "out"
    shutil.copytree(base / "out", out)
    manifest = read_manifest(out)
    shard = next(entry for entry in manifest.shards if entry.file == "edu_train_000001.bin")
    raw = bytearray((out / shard.file).read_bytes())
    raw[1500] ^= 1
    (out / shard.file).write_bytes(raw)
    state = stamps_module.file_state(out / shard.file)
    files = {shard.file: [*state, shard.sha256]}
    stamp = {"format": stamps_module.FORMAT, "data_id": manifest.data_id, "files": files}
    stamp["check"] = stamps_module._check(manifest.data_id, files)
    (out / ".verified.json").write_bytes(canonical_json(stamp))
    with pytest.raises(DataError, match=r"edu_train_000001\.bin' is damaged in chunk 0"):
        verify(out, deep=True)
    with pytest.raises(DataError, match=r"edu_train_000001\.bin' is damaged in chunk 0"):
        open_dataset(out, stamps=False).sources[0].read(2000, 10)


def test_tokens_are_told_apart_by_source(tmp_path: Path) -> None:
    def write(name: str, kinds: dict[str, int]) -> Path:
        path = tmp_path / f"{name}.jsonl"
        records = [
            {"text": f"{kind} {i} " * (5 + i % 7), "source": kind}
            for kind, n in kinds.items()
            for i in range(n)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    one = write("one", {f"k{i}": 4 + 3 * i for i in range(5)})
    prepare_text([one], tmp_path / "set", tokenizer="byte", val_fraction=0, workers=1)
    stream = BinStream(tmp_path / "set", seq_len=40, seed=0)
    count = min(stream.n_windows, 30)
    names, numbers = sources_of(stream, 3, count)
    assert numbers.shape == (count, 41)
    for row in range(count):
        for span in documents_of(stream, 3 + row):
            told = {names[number] for number in numbers[row, span.first : span.stop].tolist()}
            assert told == {span.origin}
    few, grouped = sources_of(stream, 3, count, most=2)
    assert few == [*names[:2], "others"]
    assert ((grouped == 2) == (numbers >= 2)).all()
    # Where the data set has several sources, they are what counts.
    two = [
        TextSource(name="a", inputs=one),
        TextSource(name="b", inputs=write("two", {"x": 9})),
    ]
    prepare_text(two, tmp_path / "mix", tokenizer="byte", val_fraction=0, workers=1)
    mix = BinStream(tmp_path / "mix", seq_len=40, seed=0)
    names, numbers = sources_of(mix, 0, 8)
    assert names == ["a", "b"]
    assert numbers.tolist() == [[mix.segments(row)[0]] * 41 for row in range(8)]
