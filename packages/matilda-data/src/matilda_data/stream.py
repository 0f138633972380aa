"""`BinStream`: windows of tokens in an order that is a pure function of the sample index."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.dataset import TokenDataset

__all__ = ["BinStream", "batch_sha256"]


class BinStream:
    """Samples of `seq_len + 1` tokens."""

    next_sample: int
    n_windows: int
    data_id: str

    def __init__(
        self,
        dataset: TokenDataset | str | os.PathLike[str],
        *,
        seq_len: int,
        seed: int,
        split: str = "train",
        shuffle: bool = True,
    ) -> None:
        raise NotImplementedError

    def windows(
        self, first: int, count: int, out: npt.NDArray[np.uint16] | None = None
    ) -> npt.NDArray[np.uint16]:
        """uint16[count, seq_len + 1] of global samples `first` to `first + count - 1`."""
        raise NotImplementedError

    def take(self, count: int) -> npt.NDArray[np.uint16]:
        """`windows(next_sample, count)`, then advance `next_sample`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """About 200 bytes of plain JSON."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume; a mismatch is a DataError that names the field."""
        raise NotImplementedError


def batch_sha256(tokens: npt.ArrayLike) -> str:
    """Hexadecimal SHA-256 of `tokens` as little-endian uint16 bytes in C order."""
    raise NotImplementedError
