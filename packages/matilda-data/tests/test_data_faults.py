"""A flipped, cut, missing or swapped file is refused before a token of it is used, by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import matilda_data.dataset as dataset_module
import matilda_data.manifest as manifest_module
import matilda_data.shard as shard_module
import matilda_data.stamps as stamps_module
from matilda_data import BinStream, DataError, open_dataset, prepare_text, verify
from matilda_data.columns import pack_columns
from matilda_data.documents_index import read_index
from matilda_data.manifest import read_manifest, write_manifest

SLOW = os.environ.get("MATILDA_SLOW") == "1"


@pytest.fixture
def data_dir(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Several shards of several chunks each."""
    for module in (manifest_module, shard_module, dataset_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(dataset_module, "CHUNK_TOKENS", 2048)
    out = tmp_path / "data"
    prepare_text(corpus, out, tokenizer="byte", shard_tokens=9000, val_fraction=0.2)
    return out


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit in place, as a disk would."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def wait_for_a_tick(path: Path) -> None:
    """Until the clock of the file system has moved on since `path` was touched."""
    probe = path.with_name("probe")
    while True:
        probe.touch()
        if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
            return


def read_everything(data_dir: Path) -> None:
    """Open both splits and read every token of them."""
    for split in ("train", "val"):
        dataset = open_dataset(data_dir, split)
        for source in dataset.sources:
            source.read(0, source.n_tokens)


def test_flipped_payload_byte_is_found_before_use_naming_shard_and_chunk(data_dir: Path) -> None:
    shard = data_dir / "text_train_000001.bin"
    flip(shard, 1024 + 4096 + 17)
    stream = BinStream(data_dir, seq_len=64, seed=0, shuffle=False)
    stream.windows(0, (9000 - 64) // 64)  # the other shard stays usable
    with pytest.raises(DataError, match=r"text_train_000001\.bin' is damaged in chunk 1 "):
        stream.windows(0, stream.n_windows)
    with pytest.raises(DataError, match=r"text_train_000001\.bin' is damaged in chunk 1 "):
        verify(data_dir, deep=True)
    verify(data_dir)  # the quick check looks at headers and lengths only


def test_file_touched_after_its_verification_is_verified_again(data_dir: Path) -> None:
    shard = data_dir / "text_train_000001.bin"
    stream = BinStream(data_dir, seq_len=64, seed=0, shuffle=False)
    stream.check_untouched()
    stream.windows(0, stream.n_windows)
    os.utime(shard)
    stream.check_untouched()  # the same bytes
    wait_for_a_tick(shard)
    flip(shard, 1024 + 4096 + 17)
    with pytest.raises(DataError, match=r"text_train_000001\.bin' is damaged in chunk 1 "):
        stream.check_untouched()
    flip(shard, 1024 + 4096 + 17)
    wait_for_a_tick(shard)
    stream.check_untouched()
    shard.unlink()
    stream.check_untouched()  # what was read goes on being there


def test_stamp_is_believed_at_the_first_touch_and_not_at_open_alone(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps_module, "RACY_NS", 0)
    read_everything(data_dir)
    dataset = open_dataset(data_dir)
    assert all(shard.verified for shard in dataset.sources[0].shards)
    wait_for_a_tick(data_dir / "text_train_000001.bin")
    flip(data_dir / "text_train_000001.bin", 1024 + 4096 + 17)
    with pytest.raises(DataError, match=r"text_train_000001\.bin' is damaged in chunk 1 "):
        dataset.sources[0].read(0, dataset.n_tokens)


def test_flipped_bit_anywhere_in_a_payload_is_found_before_use(data_dir: Path) -> None:
    shard = data_dir / "text_train_000001.bin"
    pristine = shard.read_bytes()
    for position in range(1024, len(pristine), 29 if SLOW else 499):
        flip(shard, position, position % 8)
        chunk = (position - 1024) // 4096
        with pytest.raises(DataError, match=rf"000001\.bin' is damaged in chunk {chunk} "):
            read_everything(data_dir)
        shard.write_bytes(pristine)
    read_everything(data_dir)


def test_undamaged_chunks_of_a_damaged_shard_are_still_served(data_dir: Path) -> None:
    flip(data_dir / "text_train_000000.bin", 1024 + 3 * 4096)
    stream = BinStream(data_dir, seq_len=64, seed=0, shuffle=False)
    assert stream.windows(0, 64).shape == (64, 65)


def test_flipped_bit_in_any_header_byte_is_refused_at_open(data_dir: Path) -> None:
    shard = data_dir / "text_train_000001.bin"
    pristine = shard.read_bytes()
    # Bytes 0 to 127 hold every field, 992 to 1023 the checksum; between them are zeros.
    between = range(128, 992, 1 if SLOW else 23)
    for position in [*range(128), *between, *range(992, 1024)]:
        flip(shard, position, position % 8)
        with pytest.raises(DataError, match=r"text_train_000001\.bin"):
            open_dataset(data_dir)
        if SLOW:
            with pytest.raises(DataError, match=r"text_train_000001\.bin"):
                verify(data_dir)
        shard.write_bytes(pristine)
    open_dataset(data_dir)


@pytest.mark.parametrize("keep", [0, 100, 1024, 5000])
def test_truncated_shard_is_refused_at_open(data_dir: Path, keep: int) -> None:
    os.truncate(data_dir / "text_train_000000.bin", keep)
    with pytest.raises(DataError, match=r"text_train_000000\.bin' is truncated"):
        open_dataset(data_dir)


def test_lengthened_shard_is_refused_at_open(data_dir: Path) -> None:
    with (data_dir / "text_train_000000.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(DataError, match=r"text_train_000000\.bin' is too long"):
        open_dataset(data_dir)


def test_missing_shard_or_index_is_refused_at_open(data_dir: Path) -> None:
    (data_dir / "text_train_000001.idx").unlink()
    with pytest.raises(DataError, match=r"text_train_000001\.idx' is missing"):
        open_dataset(data_dir)
    (data_dir / "text_train_000001.bin").unlink()
    with pytest.raises(DataError, match=r"text_train_000001\.bin' is missing"):
        open_dataset(data_dir)


def test_swapped_shards_are_refused_at_open(data_dir: Path) -> None:
    one, two = data_dir / "text_train_000000.bin", data_dir / "text_train_000001.bin"
    assert one.stat().st_size == two.stat().st_size
    one.rename(data_dir / "x")
    two.rename(one)
    (data_dir / "x").rename(two)
    with pytest.raises(DataError, match="not the one its manifest describes"):
        open_dataset(data_dir)


def test_shard_of_another_data_set_is_refused(
    data_dir: Path, tmp_path: Path, corpus_maker: Callable[[Path, int], Path]
) -> None:
    other = corpus_maker(tmp_path / "other", 63)
    prepare_text(other, tmp_path / "o", tokenizer="gpt2", shard_tokens=9000, val_fraction=0.2)
    shutil.copy(tmp_path / "o" / "text_train_000000.bin", data_dir)
    with pytest.raises(DataError, match="text_train_000000"):
        read_everything(data_dir)


def test_flipped_bit_anywhere_in_an_index_is_found_by_deep_verification(data_dir: Path) -> None:
    path = data_dir / "text_val_000000.idx"
    pristine = path.read_bytes()
    for position in range(0, len(pristine), 1 if SLOW else 37):
        flip(path, position, position % 8)
        with pytest.raises(DataError, match="text_val_000000"):
            verify(data_dir, deep=True)
        path.write_bytes(pristine)
    verify(data_dir, deep=True)


@pytest.mark.parametrize("wrong", ["a start beside its token", "a start too many"])
def test_index_of_another_shard_is_found_by_deep_verification(data_dir: Path, wrong: str) -> None:
    """Every hash is right: what made the data set was not."""
    manifest = read_manifest(data_dir)
    entry = manifest.shards[0]
    meta, columns = read_index(data_dir, entry)
    starts = columns["starts"].copy()
    if wrong == "a start too many":
        columns["starts"] = np.append(starts, starts[-1])
    else:
        starts[-1] += 1
        columns["starts"] = starts
    raw = pack_columns(meta, columns)
    (data_dir / entry.index_file).write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    changed = replace(entry, index_bytes=len(raw), index_sha256=digest)
    write_manifest(data_dir, replace(manifest, shards=(changed, *manifest.shards[1:])))
    with pytest.raises(DataError, match=f"{entry.index_file}' does not fit its shard"):
        verify(data_dir, deep=True)


def test_flipped_manifest_byte_is_refused(data_dir: Path) -> None:
    path = data_dir / "manifest.json"
    pristine = path.read_bytes()
    for position in range(0, len(pristine), 1 if SLOW else 29):
        flip(path, position, position % 8)
        with pytest.raises(DataError):
            read_everything(data_dir)
        path.write_bytes(pristine)
    read_everything(data_dir)


def test_manifest_edited_by_hand_is_refused(data_dir: Path) -> None:
    path = data_dir / "manifest.json"
    value = json.loads(path.read_bytes())
    value["shards"][0]["chunk_sha256"][0] = "0" * 64
    path.write_text(json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n")
    with pytest.raises(DataError, match=r"manifest\.json' is damaged"):
        open_dataset(data_dir)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("shards", 0, "file"), "../text_train_000000.bin"),
        (("shards", 0, "file"), 7),
        (("shards", 0, "tokens"), 4000),
        (("shards", 0, "documents"), "many"),
        (("shards", 0, "chunk_sha256"), []),
        (("sources", 0, "weight"), -1),
        (("sources", 0, "tokens"), {}),
        (("tokenizer", "eot_id"), None),
    ],
)
def test_manifest_edited_by_hand_with_a_fitting_data_id_is_refused(
    data_dir: Path, where: tuple[str | int, ...], value: object
) -> None:
    path = data_dir / "manifest.json"
    content = json.loads(path.read_bytes())
    content.pop("data_id")
    item = content
    for key in where[:-1]:
        item = item[key]
    item[where[-1]] = value
    data_id = hashlib.sha256(manifest_module.canonical_json(content)).hexdigest()
    path.write_bytes(manifest_module.render(content, data_id))
    with pytest.raises(DataError, match=r"is damaged|not the one its manifest describes"):
        read_everything(data_dir)


def test_other_format_version_is_refused_by_name(data_dir: Path) -> None:
    path = data_dir / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"matilda-data/1", b"matilda-data/2"))
    with pytest.raises(DataError, match="has format 'matilda-data/2'"):
        open_dataset(data_dir)


def test_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no `manifest\.json`"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="unknown split 'test'"):
        open_dataset(tmp_path, "test")


def test_split_without_documents_is_refused_with_the_fix(corpus: Path, tmp_path: Path) -> None:
    prepare_text(corpus, tmp_path / "out", tokenizer="byte", val_fraction=0)
    with pytest.raises(DataError, match=r"has no 'val' documents; .* larger `--val-fraction`"):
        open_dataset(tmp_path / "out", "val")
