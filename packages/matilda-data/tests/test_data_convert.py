"""Archives, import and export of plain shards, and the rest of the console command."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from matilda_data import (
    BinStream,
    DataError,
    documents_of,
    open_bin,
    open_dataset,
    prepare_text,
    verify,
)
from matilda_data.archive import compress_dataset
from matilda_data.cli import main
from matilda_data.convert import export_bin, import_bin


@pytest.fixture
def data_dir(corpus: Path, tmp_path: Path) -> Path:
    prepare_text(corpus, tmp_path / "data", tokenizer="gpt2", shard_tokens=3000, val_fraction=0.2)
    return tmp_path / "data"


def test_archive_expands_to_the_same_data_set(data_dir: Path) -> None:
    before = BinStream(data_dir, seq_len=20, seed=0).windows(0, 50)
    identity = open_dataset(data_dir).data_id
    raw, packed = compress_dataset(data_dir)
    assert packed < raw
    assert not list(data_dir.glob("*.bin"))
    assert compress_dataset(data_dir) == (raw, packed)
    assert (BinStream(data_dir, seq_len=20, seed=0).windows(0, 50) == before).all()
    assert verify(data_dir, deep=True).data_id == identity


def test_flipped_bit_anywhere_in_an_archive_is_refused(data_dir: Path) -> None:
    compress_dataset(data_dir)
    archive = data_dir / "text_val_000000.bin.zst"
    pristine = archive.read_bytes()
    refusals = []
    for position in range(0, len(pristine), max(len(pristine) // 60, 1)):
        raw = bytearray(pristine)
        raw[position] ^= 1 << position % 8
        archive.write_bytes(raw)
        try:
            open_dataset(data_dir, "val")
        except DataError as error:
            refusals.append(str(error))
            assert not (data_dir / "text_val_000000.bin").exists()
        else:  # a bit that zstd ignores: what came out is verified all the same
            verify(data_dir, deep=True)
            (data_dir / "text_val_000000.bin").unlink()
    assert len(refusals) > 40
    assert all("text_val_000000.bin.zst' is damaged" in message for message in refusals)
    archive.write_bytes(pristine[:-50])
    with pytest.raises(DataError, match=r"text_val_000000\.bin\.zst' is damaged"):
        open_dataset(data_dir, "val")
    assert not list(data_dir.glob(".tmp*"))


def test_compressing_a_damaged_shard_is_refused_and_keeps_it(data_dir: Path) -> None:
    shard = data_dir / "text_train_000000.bin"
    raw = bytearray(shard.read_bytes())
    raw[1500] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=r"text_train_000000\.bin"):
        compress_dataset(data_dir)
    assert shard.exists()


def test_export_spares_other_data_sets_and_shards(data_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.txt").write_text("other text " * 3000)
    prepare_text(tmp_path / "more", other, tokenizer="gpt2", shard_tokens=3000, val_fraction=0)
    with pytest.raises(DataError, match="other' holds another data set"):
        export_bin(data_dir, other)
    assert verify(other, deep=True).shards
    first = export_bin(other, tmp_path / "plain")
    assert export_bin(other, tmp_path / "plain") == first
    (tmp_path / "plain/text_train_000099.bin").touch()
    with pytest.raises(DataError, match=r"other shards, such as 'text_train_000099\.bin'"):
        export_bin(data_dir, tmp_path / "plain")


def test_export_and_import_keep_every_token(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export-bin", str(data_dir), "--out-dir", str(tmp_path / "plain")]) == 0
    shards = sorted((tmp_path / "plain").glob("text_train_*.bin"))
    words = np.frombuffer(shards[0].read_bytes(), dtype="<i4", count=256)
    assert not words[3:].any()
    tokens = open_dataset(data_dir).sources[0]
    assert (
        open_bin(shards).sources[0].read(0, tokens.n_tokens) == tokens.read(0, tokens.n_tokens)
    ).all()

    val = [str(path) for path in sorted((tmp_path / "plain").glob("text_val_*.bin"))]
    arguments = ["convert", *map(str, shards), "--val", *val, "--out-dir", str(tmp_path / "again")]
    assert main(arguments) == 0
    assert verify(tmp_path / "again", deep=True).documents == 60
    again = open_dataset(tmp_path / "again")
    assert again.n_documents == open_dataset(data_dir).n_documents
    assert (again.sources[0].read(0, tokens.n_tokens) == tokens.read(0, tokens.n_tokens)).all()
    capsys.readouterr()
    assert main(arguments) == 2
    assert "already holds a data set" in capsys.readouterr().err


def test_shards_are_never_written_over_themselves(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export-bin", str(data_dir), "--out-dir", str(data_dir)]) == 2
    assert "holds the data set itself" in capsys.readouterr().err
    verify(data_dir, deep=True)
    assert main(["export-bin", str(data_dir), "--out-dir", str(data_dir / "manifest.json")]) == 2
    assert "File exists" in capsys.readouterr().err
    (tmp_path / "plain").mkdir()
    shard = tmp_path / "plain" / "bin_train_000000.bin"  # the name that its copy would get
    shutil.copy(data_dir / "text_train_000000.bin", shard)
    before = shard.read_bytes()
    assert main(["convert", str(shard), "--out-dir", str(tmp_path / "plain")]) == 2
    assert "holds shards to convert" in capsys.readouterr().err
    assert shard.read_bytes() == before


def test_shards_that_begin_in_mid_document_are_traced_from_their_first_token(
    tmp_path: Path,
) -> None:
    # llm.c's second training shard begins with the rest of the first one's last document.
    eot = 256
    for name, tokens in {"a": [5, 6, 7, eot, 1, 2, 3, eot, *[9] * 50], "b": [5] * 60}.items():
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(tokens)
        path = tmp_path / f"{name}.bin"
        path.write_bytes(header.tobytes() + np.array(tokens, dtype="<u2").tobytes())
        out = tmp_path / name
        import_bin([path], out, tokenizer="byte")
        verify(out, deep=True)
        stream = BinStream(out, seq_len=8, seed=0, shuffle=False)
        spans = [(s.id, s.first, s.stop) for s in documents_of(stream, 0)]
        assert spans[0] == (f"{name}.bin:0", 0, 3 if name == "a" else 9)
        packed = BinStream(out, seq_len=8, seed=0, rows="documents")
        rows = packed.packed(0, packed.n_windows)
        assert rows.loss_mask.sum() == len(tokens) - (3 if name == "a" else 1)


def test_trace_names_documents_and_batch(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["trace", str(data_dir), "--seq-len", "20", "--seed", "3"]
    assert main([*base, "--sample", "5", "--text"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"samples 5 to 5, sha256 [0-9a-f]{64}\n5 tokens 0-", out)
    assert main([*base, "--step", "2", "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("samples 8 to 11, sha256 ")
    assert {line.split()[0] for line in out.splitlines()[1:]} == {"8", "9", "10", "11"}
    assert main(base) == 2
    assert "--sample or --step" in capsys.readouterr().err
    for wrong in (["--step", "0", "--batch-size", "0"], ["--sample", str(2**70)]):
        assert main([*base, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_missing_archive_and_shard_is_refused(data_dir: Path) -> None:
    compress_dataset(data_dir)
    (data_dir / "text_train_000000.bin.zst").unlink()
    with pytest.raises(DataError, match=r"text_train_000000\.bin' is missing"):
        open_dataset(data_dir)
    shutil.copy(data_dir / "text_val_000000.bin.zst", data_dir / "text_train_000000.bin.zst")
    with pytest.raises(DataError, match=r"text_train_000000\.bin\.zst' is damaged"):
        open_dataset(data_dir)
