"""Preparation: what it reads, and that its bytes depend on nothing else."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import matilda_data.inputs as inputs_module
from matilda_data import (
    DataError,
    Manifest,
    Progress,
    TextSource,
    load_tokenizer,
    open_dataset,
    prepare_text,
    verify,
)
from matilda_data.archive import compress_dataset
from matilda_data.shard import read_header


def documents(data_dir: Path, split: str) -> list[str]:
    """The texts of a split, decoded from its shards in order."""
    dataset = open_dataset(data_dir, split)
    texts: list[str] = []
    for source in dataset.sources:
        tokens = source.read(0, source.n_tokens)
        starts = np.flatnonzero(tokens == dataset.eot_id)
        assert starts[0] == 0
        tokenizer = load_tokenizer(dataset.tokenizer_name)
        texts += [tokenizer.decode(piece) for piece in np.split(tokens, starts[1:])]
    return texts


def tree_sha256(data_dir: Path) -> dict[str, str]:
    """SHA-256 of every file below `data_dir`."""
    return {
        str(path.relative_to(data_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(data_dir.rglob("*"))
        if path.is_file()
    }


def prepare(inputs: object, out: Path, **options: object) -> Manifest:
    base = {"tokenizer": "byte", "val_fraction": 0.2, "workers": 1, "shard_tokens": 5000}
    return prepare_text(inputs, out, **{**base, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2"])
def test_every_document_comes_back_whole_once(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    prepare(corpus, tmp_path / "out", tokenizer=tokenizer)
    expected = [path.read_text() for path in [*corpus.rglob("*.txt"), *corpus.rglob("*.py")]]
    expected += [json.loads(line)["text"] for line in (corpus / "z.jsonl").read_text().splitlines()]
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(expected)
    assert len(train) > len(val) > 0


def test_all_input_kinds_give_the_same_documents(
    tmp_path: Path, text_maker: Callable[[str, int], str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [text_maker(f"doc{i}", 30) for i in range(20)]
    records = [{"text": text, "id": f"{i}"} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "l.jsonl").write_bytes(lines)
    half = len(lines) // 2  # two frames, cut in mid-line
    packed = zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
    (tmp_path / "l.jsonl.zst").write_bytes(packed)
    parquet.write_table(
        pyarrow.Table.from_pylist(records), tmp_path / "l.parquet", row_group_size=7
    )
    shas = set()
    for name in ("l.jsonl", "l.jsonl.zst", "l.parquet"):
        manifest = prepare(tmp_path / name, tmp_path / f"out-{name}")
        shas.add(tuple((shard.sha256, shard.index_sha256) for shard in manifest.shards))
        assert documents(tmp_path / f"out-{name}", "val")
    assert len(shas) == 1


def test_a_mark_before_json_is_no_text_and_one_within_it_is(tmp_path: Path) -> None:
    texts = ["first", "\ufeffsecond", "third"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    source = tmp_path / "marked.jsonl"
    source.write_text(lines, encoding="utf-8-sig")
    prepare(source, tmp_path / "out", val_fraction=0)
    assert sorted(documents(tmp_path / "out", "train")) == sorted(texts)
    source.write_bytes(lines.encode() + b"\n" + source.read_bytes())  # one file after another
    with pytest.raises(DataError, match=r"line 4 .*is not JSON"):
        prepare(source, tmp_path / "refused")


def test_zstd_window_of_128_mib_is_read(tmp_path: Path) -> None:
    line = json.dumps({"text": "long window"}).encode() + b"\n"
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compress(line)
    (tmp_path / "w.jsonl.zst").write_bytes(packed)
    prepare(tmp_path / "w.jsonl.zst", tmp_path / "out", val_fraction=0)
    assert documents(tmp_path / "out", "train") == ["long window"]


def test_globs_and_file_lists_are_read(corpus: Path, tmp_path: Path) -> None:
    texts = prepare(str(corpus / "a" / "*.txt"), tmp_path / "glob", val_fraction=0)
    assert texts.total_documents("train") == 20
    listed = prepare(sorted(corpus.glob("a/*.txt")), tmp_path / "list", val_fraction=0)
    assert [s.sha256 for s in listed.shards] == [s.sha256 for s in texts.shards]
    deep = prepare(str(corpus / "**" / "*.py"), tmp_path / "deep", val_fraction=0)
    assert deep.total_documents("train") == 20


def test_exclude_and_include_choose_files(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(corpus, tmp_path / "x", val_fraction=0, exclude=["deep", "*.jsonl"])
    assert manifest.total_documents("train") == 20
    manifest = prepare(
        corpus, tmp_path / "i", val_fraction=0, include=lambda name: name.startswith("a/deep/")
    )
    assert manifest.total_documents("train") == 20


def test_bytes_do_not_depend_on_place_workers_or_unit_order(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", 2000)
    prepare(corpus, tmp_path / "one", workers=1)
    shutil.copytree(corpus, tmp_path / "elsewhere" / "corpus")
    prepare(tmp_path / "elsewhere" / "corpus", tmp_path / "three", workers=3)
    one = tree_sha256(tmp_path / "one")
    assert len(one) > 8
    assert one == tree_sha256(tmp_path / "three")


@pytest.mark.parametrize("unit_bytes", [1, 100, 997, 5000, 10**6])
@pytest.mark.parametrize("name", ["z.jsonl", "z.jsonl.zst"])
def test_units_divide_lines_without_loss(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, name: str
) -> None:
    raw = (corpus / "z.jsonl").read_bytes().rstrip(b"\n")  # no newline at the end
    (corpus / "z.jsonl").write_bytes(raw)
    (corpus / "z.jsonl.zst").write_bytes(zstandard.compress(raw))
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(inputs_module, "BLOCK_BYTES", 1600)
    monkeypatch.setattr(inputs_module, "ZSTD_UNITS", 10**6)
    prepare(corpus / name, tmp_path / "out", val_fraction=0)
    expected = [json.loads(line)["text"] for line in raw.splitlines()]
    assert documents(tmp_path / "out", "train") == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9) | st.just(0), max_size=60),
    breaks=st.sets(st.integers(0, 59)),
)
def test_small_files_are_grouped_in_order_up_to_a_units_bytes(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], breaks: set[int]
) -> None:
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", 12)
    # Hashing opens files; here there are none.
    monkeypatch.setattr(inputs_module, "_hash_file", lambda file: f"hash of {file.name}")
    lines = inputs_module.Unit(kind="lines", files=())
    monkeypatch.setattr(inputs_module, "_line_units", lambda _: [lines])
    files = [
        inputs_module.InputFile(
            path="", name=f"{i}.jsonl" if i in breaks else f"{i}.txt", size=size, mtime_ns=0
        )
        for i, size in enumerate(sizes)
    ]
    # The definition: a file joins the group before it as long as their sum is at most a unit's.
    groups: list[list[int]] = []
    joins = False
    for i, size in enumerate(sizes):
        if i in breaks:
            groups.append([])
            joins = False
        elif joins and sum(sizes[j] for j in groups[-1]) + size <= 12:
            groups[-1].append(i)
        else:
            groups.append([i])
            joins = True
    units = inputs_module.plan_units(files)
    assert [[file.name for file in unit.files] for unit in units] == [
        [f"{i}.txt" for i in group] for group in groups
    ]
    assert [unit.input_bytes for unit in units] == [sum(sizes[i] for i in g) for g in groups]
    assert [unit.kind for unit in units] == ["text" if group else "lines" for group in groups]


class CountedSize(int):
    """A file's size that counts how often it is added."""

    additions = 0

    def __add__(self, other: int) -> int:
        CountedSize.additions += 1
        return int(self) + int(other)

    __radd__ = __add__


def test_dividing_adds_each_files_size_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # The sum over the group for each file was quadratic, and empty files never close a group.
    monkeypatch.setattr(inputs_module, "_hash_file", lambda file: "")
    monkeypatch.setattr(CountedSize, "additions", 0)
    files = [
        inputs_module.InputFile(path="", name=f"{i}.txt", size=CountedSize(i % 2), mtime_ns=0)
        for i in range(2000)
    ]
    (unit,) = inputs_module.plan_units(files)
    assert (len(unit.files), unit.input_bytes) == (2000, 1000)
    assert CountedSize.additions <= 3 * 2000


def test_documents_cross_shards_of_exact_size(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(corpus, tmp_path / "out", shard_tokens=1024)
    train = [shard for shard in manifest.shards if shard.split == "train"]
    assert [shard.tokens for shard in train[:-1]] == [1024] * (len(train) - 1)
    assert sum(shard.documents for shard in train) == manifest.total_documents("train")
    assert verify(tmp_path / "out", deep=True).documents == 60


def test_shards_are_what_llm_c_reads(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(corpus, tmp_path / "out")
    for shard in manifest.shards:
        raw = (tmp_path / "out" / shard.file).read_bytes()
        words = np.frombuffer(raw, dtype="<i4", count=256)
        assert words[:3].tolist() == [20240520, 1, shard.tokens]
        assert len(raw) == 1024 + 2 * shard.tokens
        header = read_header(tmp_path / "out" / shard.file)
        assert header.payload_sha256 == hashlib.sha256(raw[1024:]).hexdigest()
        assert header.tokenizer_sha256 == load_tokenizer("byte").sha256
        assert hashlib.sha256(raw).hexdigest() == shard.sha256


def test_split_is_stable_when_the_corpus_grows(
    corpus: Path, tmp_path: Path, text_maker: Callable[[str, int], str]
) -> None:
    prepare(corpus, tmp_path / "small")
    for i in range(30):
        (corpus / f"more{i}.txt").write_text(text_maker(f"more{i}", 40))
    prepare(corpus, tmp_path / "large")
    small, large = documents(tmp_path / "small", "val"), documents(tmp_path / "large", "val")
    assert set(small) < set(large)
    assert not set(documents(tmp_path / "large", "train")) & set(large)


def test_exact_copies_are_dropped_across_sources(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "a", tmp_path / "copy")
    sources = [
        TextSource(name="first", inputs=corpus, weight=83),
        TextSource(name="second", inputs=[tmp_path / "copy", corpus / "z.jsonl"], weight=17),
    ]
    with pytest.raises(DataError, match="source 'second' has no training document that is not"):
        prepare(sources, tmp_path / "out")
    manifest = prepare(sources, tmp_path / "all", deduplicate=False)
    assert sum(manifest.sources[1].documents.values()) == 60
    (tmp_path / "copy" / "new.txt").write_text("something of its own")
    manifest = prepare(sources, tmp_path / "out", val_fraction=0)
    assert manifest.preparation["dropped"] == {"duplicates": 60, "empty": 0, "contaminated": 0}
    assert [sum(source.documents.values()) for source in manifest.sources] == [60, 1]


def test_rerun_returns_the_finished_set_untouched(corpus: Path, tmp_path: Path) -> None:
    def times() -> dict[str, int]:
        files = (tmp_path / "out").iterdir()  # a stamp of the verification may join them
        return {file.name: file.stat().st_mtime_ns for file in files if file.name[0] != "."}

    first = prepare(corpus, tmp_path / "out")
    before = times()
    assert prepare(corpus, tmp_path / "out") == first
    assert times() == before
    compress_dataset(tmp_path / "out")
    packed = times()
    assert prepare(corpus, tmp_path / "out") == first
    assert times() == packed, "archives are not expanded for that"


def test_rerun_mends_a_damaged_set(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    prepare(corpus, out)
    whole = tree_sha256(out)
    for name in ("text_train_000000.bin", "text_val_000000.idx", "text_val_000000.bin"):
        raw = bytearray((out / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (out / name).write_bytes(raw)
        caplog.clear()
        prepare(corpus, out)
        assert [name in record.message for record in caplog.records] == [True]
        assert {**tree_sha256(out), **whole} == tree_sha256(out)
        (out / name).unlink()
        prepare(corpus, out)
        assert {**tree_sha256(out), **whole} == tree_sha256(out)
    (out / "manifest.json").write_bytes(b"{}")
    with pytest.raises(DataError, match="in another directory or after deleting this one"):
        prepare(corpus, out)


def test_other_inputs_or_options_never_overwrite(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "out")
    before = tree_sha256(tmp_path / "out")
    for options in ({"val_fraction": 0.3}, {"tokenizer": "gpt2"}, {"shard_tokens": 6000}):
        with pytest.raises(DataError, match="already holds a data set of other inputs"):
            prepare(corpus, tmp_path / "out", **options)
    (corpus / "a" / "000.txt").write_text("changed")
    with pytest.raises(DataError, match="already holds a data set of other inputs"):
        prepare(corpus, tmp_path / "out")
    assert tree_sha256(tmp_path / "out") == before


def test_progress_gives_plain_growing_numbers(corpus: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    manifest = prepare(corpus, tmp_path / "out", progress=seen.append)
    assert [row.stage for row in seen[-2:]] == ["pack", "done"]
    assert seen[-1].documents == 60
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert seen[-1].tokens == manifest.total_tokens("train") + manifest.total_tokens("val")
    assert all(a.tokens <= b.tokens for a, b in itertools.pairwise(seen))


def test_text_is_kept_to_the_byte(tmp_path: Path) -> None:
    texts = ["\ufeffmark", "nul\0nul", "crlf\r\nline", "e\u0301 not é", " ", "\n", "<|endoftext|>"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    (tmp_path / "empty.txt").write_bytes(b"")
    for tokenizer in ("byte", "gpt2"):
        out = tmp_path / f"out-{tokenizer}"
        manifest = prepare(sorted(tmp_path.glob("*.txt")), out, tokenizer=tokenizer, val_fraction=0)
        assert documents(out, "train") == texts
        assert manifest.preparation["dropped"] == {"duplicates": 0, "empty": 1, "contaminated": 0}


def test_undecodable_bytes_are_replaced_where_that_is_asked(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    prepare(tmp_path / "latin.txt", tmp_path / "out", invalid_utf8="replace", val_fraction=0)
    assert documents(tmp_path / "out", "train") == ["caf\ufffd"]


def test_links_to_directories_are_left_out_with_a_warning(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = prepare(corpus, tmp_path / "plain").data_id
    assert not caplog.records
    (corpus / "a" / "linked").symlink_to(corpus / "a" / "deep")
    (corpus / "loop").symlink_to(corpus)
    assert prepare(corpus, tmp_path / "out").data_id == expected
    assert "2 links to directories" in caplog.text
    assert "a/linked" in caplog.text


def test_one_source_needs_no_list(corpus: Path, tmp_path: Path) -> None:
    source = TextSource(name="edu", inputs=corpus)
    alone = prepare(source, tmp_path / "alone")
    assert alone.data_id == prepare([source], tmp_path / "listed").data_id


def test_fixing_a_bad_line_keeps_the_work_done_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(DataError, match=r"line 1 of .*b\.jsonl"):
        prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", command="redo it")
    with pytest.raises(DataError, match="incomplete; finish it with: redo it"):
        open_dataset(tmp_path / "out")
    (tmp_path / "b.jsonl").write_text('{"text": "now fine too"}\n')
    seen: list[Progress] = []
    prepare(
        [tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
        tmp_path / "out",
        val_fraction=0,
        progress=seen.append,
    )
    assert seen[0].documents == 1
    assert documents(tmp_path / "out", "train") == ["fine", "now fine too"]


@pytest.mark.parametrize("pattern", ["", "**/*"])
@pytest.mark.parametrize("place", ["", "a/out"])
def test_resume_takes_no_work_of_its_own_for_text(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, place: str
) -> None:
    monkeypatch.setattr(inputs_module, "UNIT_BYTES", 3000)  # about twenty units
    inputs, out = str(corpus / pattern), corpus / place

    class StoppedError(Exception):
        pass

    def stop(row: Progress) -> None:
        if row.stage == "encode" and row.documents > 30:
            raise StoppedError

    prepare(inputs, tmp_path / "elsewhere")
    whole = tree_sha256(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(StoppedError):
            prepare(inputs, out, progress=stop)
    assert (out / ".prepare" / "journal.jsonl").stat().st_size > 0
    # Nor does another preparation of the same inputs, such as another machine's part.
    prepare(inputs, tmp_path / "beside")
    assert tree_sha256(tmp_path / "beside") == whole
    seen: list[Progress] = []
    prepare(inputs, out, progress=seen.append)
    assert 30 < seen[0].documents < 60, "the work done before counts"
    assert {name: tree_sha256(out)[name] for name in whole} == whole
    # The finished data set is no text either.
    prepare(inputs, out)
    prepare(inputs, tmp_path / "after")
    assert tree_sha256(tmp_path / "after") == whole


def test_two_preparations_of_one_directory_do_not_mix(corpus: Path, tmp_path: Path) -> None:
    def second(_: Progress) -> None:
        with pytest.raises(DataError, match="another process is preparing"):
            prepare(corpus, tmp_path / "out")

    calls: list[str] = []

    def once(row: Progress) -> None:
        if row.stage == "pack" and not calls:
            calls.append(row.stage)
            second(row)

    prepare(corpus, tmp_path / "out", progress=once)
    assert calls == ["pack"]
    assert verify(tmp_path / "out", deep=True).documents == 60
