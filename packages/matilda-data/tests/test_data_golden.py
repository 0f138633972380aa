"""A data set as 0.1.0 wrote it: opened, identified, verified and streamed the same for ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from matilda_data import BinStream, batch_sha256, documents_of, open_dataset, verify


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy, since opening may leave stamps."""
    return Path(shutil.copytree(Path(__file__).parent / "golden", tmp_path / "golden"))


def test_old_data_set_keeps_its_identity_and_verifies(golden: Path) -> None:
    assert open_dataset(golden).data_id == DATA_ID
    assert verify(golden, deep=True).documents == 30


def test_old_data_set_streams_in_the_same_order(golden: Path) -> None:
    stream = BinStream(golden, seq_len=32, seed=1234)
    assert batch_sha256(stream.windows(0, 64)) == FIRST
    assert batch_sha256(stream.windows(10**10, 64)) == FAR
    packed = BinStream(golden, seq_len=32, seed=1234, rows="documents")
    assert batch_sha256(packed.windows(0, 64)) == PACKED
    assert documents_of(stream, 0)[0].id == FIRST_DOCUMENT


DATA_ID = "7fa91925d391238562631554f1bdb52a07f9d560234ba22184db2f9b45ba7bf8"
FIRST = "fa45f2d0af041f38ffafffa6a06f9453560dba03bc3492a341fd6b2982b93e34"
FAR = "53728fb922161e80ae58678ffa2c1b6c6794359218977a4ebcc2b2d757f26462"
PACKED = "a9c3bc68610dd05007474b3aa73a7d417f379f46a4adc16ff6a61784c0a89c6e"
FIRST_DOCUMENT = "005.txt"
