"""`verify`: is every byte of a data set what its manifest says?"""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` looked at."""

    data_id: str
    shards: int
    tokens: int
    documents: int
    bytes_hashed: int
    seconds: float


def verify(data_dir: str | os.PathLike[str], deep: bool = False) -> VerifyReport:
    """Check a data set; raises DataError naming the first bad file."""
    raise NotImplementedError
