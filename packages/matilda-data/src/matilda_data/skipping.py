"""Skipped samples: intervals of the order that a run leaves out, such as those of a loss spike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.errors import DataError
from matilda_data.integers import plain_integer

__all__ = ["SkipMap"]

Interval = tuple[int, int]


class SkipMap:
    """Maps the n-th sample that is used to its number in the unskipped order, in O(log intervals).

    Args:
        intervals: half-open [first, stop) ranges of sample numbers; may touch or overlap.
    """

    def __init__(self, intervals: Sequence[Interval]) -> None:
        merged: list[list[int]] = []
        for first, stop in sorted(map(_interval, intervals)):
            if not 0 <= first < stop:
                raise DataError(f"skip interval ({first}, {stop}) is not 0 ≤ first < stop")
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], stop)
            else:
                merged.append([first, stop])
        self.intervals: tuple[Interval, ...] = tuple((first, stop) for first, stop in merged)
        lengths = np.array([stop - first for first, stop in self.intervals], dtype=np.int64)
        self._skipped = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # How many used samples lie before each interval.
        firsts = np.array([first for first, _ in self.intervals], dtype=np.int64)
        self._used_before = firsts - self._skipped[:-1]

    def original(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers in the unskipped order of the used `samples`."""
        passed = np.searchsorted(self._used_before, samples, side="right")
        result: npt.NDArray[np.int64] = samples + self._skipped[passed]
        return result

    def before(self, used: int) -> list[list[int]]:
        """The intervals that the first `used` samples have passed, cut at the last of them."""
        if used == 0:
            return []
        last = int(self.original(np.array([used - 1], dtype=np.int64))[0])
        return [[first, min(stop, last)] for first, stop in self.intervals if first < last]


def _interval(value: Any) -> Interval:
    try:
        first, stop = value
    except (TypeError, ValueError):
        raise DataError(
            f"`skip` holds {value!r}; give a list of intervals, [(first, stop), …]"
        ) from None
    return plain_integer("skip", first), plain_integer("skip", stop)
