"""Whether everything that is written is finite, asked of the very chunks on their way to disk.

With the sign bit removed, a float's bits as an integer are at least those of infinity exactly
when it is infinite or NaN: one `and` and one `max` over a chunk that fits the cache of a core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from matilda_ckpt.tensor_file import CHUNK_BYTES

LOOK_BYTES = 256 << 10

_LIMITS: dict[str, tuple[str, int, int]] = {
    "F64": ("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "C64": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
    "F8_E5M2": ("|u1", 0x7F, 0x7C),
    "F8_E4M3": ("|u1", 0x7F, 0x7F),
}
"""dtype → (integer of its width, mask without the sign, smallest non-finite pattern)."""


class FiniteWatch:
    """Looks at every chunk of every floating-point tensor of one save."""

    def __init__(self) -> None:
        self.finite = True

    def over(
        self, dtype: str, read: Callable[[], Iterable[memoryview]]
    ) -> Callable[[], Iterable[memoryview]]:
        """`read` with a look at what it yields."""
        if dtype not in _LIMITS:
            return read
        code, mask, limit = _LIMITS[dtype]

        def watched() -> Iterator[memoryview]:
            scratch: np.ndarray[Any, Any] = np.empty(LOOK_BYTES // np.dtype(code).itemsize, code)
            for piece in read():
                for start in range(0, len(piece), CHUNK_BYTES):
                    chunk = piece[start : start + CHUNK_BYTES]
                    for at in range(0, len(chunk) if self.finite else 0, LOOK_BYTES):
                        bits = np.frombuffer(chunk[at : at + LOOK_BYTES], dtype=code)
                        masked = np.bitwise_and(
                            bits, bits.dtype.type(mask), out=scratch[: len(bits)]
                        )
                        if int(masked.max()) >= limit:
                            self.finite = False
                    yield chunk

        return watched
