"""A hash of every run of words of a text, in numpy over its characters.

Words are runs of letters and digits in lower case, as the regular expression `[^\\W_]+` finds them
in `text.lower()`. Code points become one polynomial modulo 2^64 whose prefix sums give the hash of
any stretch: a few array operations a character instead of a look at every word.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

__all__ = ["run_hashes"]

FACTOR = 0x9E3779B97F4A7C15
INVERSE = pow(FACTOR, -1, 1 << 64)
# Lower case of these depends on their neighbours, or is two characters.
SPECIAL_LOWER = ("\u03a3", "\u0130")

UInt64Array = npt.NDArray[np.uint64]


def run_hashes(text: str, words: int) -> UInt64Array:
    """uint64 hash of each run of `words` words of `text`, in order."""
    if any(letter in text for letter in SPECIAL_LOWER):
        text = text.lower()
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    letters = np.take(_lower_letters(), points)
    # Keep letters and the first character after each word.
    keep = letters != 0
    keep[1:] |= keep[:-1]
    letters = letters[keep]
    gaps = np.flatnonzero(letters == 0)
    starts = np.concatenate([[0], gaps + 1])
    ends = gaps if not len(letters) or letters[-1] == 0 else np.append(gaps, len(letters))
    count = len(ends) - words + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    powers, inverses = _powers(len(letters))
    sums = np.zeros(len(letters) + 1, dtype=np.uint64)
    np.cumsum(letters * powers[: len(letters)], out=sums[1:])
    first, last = starts[:count], ends[words - 1 :]
    hashes: UInt64Array = (sums[last] - sums[first]) * inverses[first]
    return hashes


@functools.cache
def _lower_letters() -> npt.NDArray[np.uint64]:
    """uint64[0x110000]: the lower-case code point of each letter or digit, 0 for all others."""
    table = np.zeros(0x110000, dtype=np.uint64)
    for point in range(0x110000):
        lower = chr(point).lower()
        if len(lower) == 1 and lower.isalnum():
            table[point] = ord(lower)
    return table


@functools.lru_cache(maxsize=1)
def _power_tables(size: int) -> tuple[UInt64Array, UInt64Array]:
    """uint64[size] powers of the factor and of its inverse, modulo 2^64."""
    tables = []
    for base in (FACTOR, INVERSE):
        table = np.full(size, base, dtype=np.uint64)
        table[0] = 1
        tables.append(np.multiply.accumulate(table))
    return tables[0], tables[1]


def _powers(size: int) -> tuple[UInt64Array, UInt64Array]:
    return _power_tables(1 << max(size, 1 << 16).bit_length())
