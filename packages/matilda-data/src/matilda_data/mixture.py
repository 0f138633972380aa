"""Mixing sources by integer weights: sample number to (source, index within source), in O(1).

Weights 83 and 17 give exactly 83 and 17 of every 100 samples. The slots of a block are laid out by
largest deficit, so shares are even inside it, and each block's layout is rotated by a keyed amount,
so that the block length and a batch size cannot fall into step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from matilda_data.errors import DataError
from matilda_data.order import keys, mix64

__all__ = ["Mixture", "Phase", "distinct"]

MAX_BLOCK = 1 << 20

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Weights that hold from a sample number on."""

    start: int
    """First sample of the phase."""
    weights: tuple[int, ...]
    """One integer ≥ 0 for each source; a zero leaves the source out."""


def distinct(values: Int64Array) -> list[int]:
    """The distinct `values`, sorted; for a batch quicker than `np.unique`, which imports more."""
    return sorted(set(values.tolist()))


class Mixture:
    """The mixture that `phases` describe (the first starts at sample 0)."""

    def __init__(self, phases: Sequence[Phase], *key_fields: str | int) -> None:
        if not phases or phases[0].start != 0:
            raise DataError("the first mixture phase must start at sample 0")
        self.phases = tuple(phases)
        self._starts = np.array([phase.start for phase in phases], dtype=np.int64)
        if (np.diff(self._starts) <= 0).any():
            raise DataError("mixture phases must start at increasing sample numbers")
        self._blocks = [
            _Block(phase.weights, int(keys(1, "mixture", number, *key_fields)[0]))
            for number, phase in enumerate(phases)
        ]
        n_sources = len(phases[0].weights)
        self._carried = np.zeros((len(phases), n_sources), dtype=np.int64)
        for number in range(1, len(phases)):
            length = phases[number].start - phases[number - 1].start
            self._carried[number] = self._carried[number - 1] + self._blocks[number - 1].counts(
                length
            )

    def locate(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        """For each sample number its source and the index within that source, int64 arrays."""
        number = np.searchsorted(self._starts, samples, side="right") - 1
        source = np.empty_like(samples)
        index = np.empty_like(samples)
        for phase in distinct(number):
            rows = number == phase
            local_source, local_index = self._blocks[phase].locate(
                samples[rows] - self._starts[phase]
            )
            source[rows] = local_source
            index[rows] = local_index + self._carried[phase][local_source]
        return source, index

    def counts(self, n_samples: int) -> Int64Array:
        """How many of the first `n_samples` samples come from each source."""
        phase = int(np.searchsorted(self._starts, n_samples, side="right")) - 1
        local = n_samples - int(self._starts[phase])
        counts: Int64Array = self._carried[phase] + self._blocks[phase].counts(local)
        return counts


class _Block:
    """One phase's repeating table of slots."""

    def __init__(self, weights: Sequence[int], key: int) -> None:
        if any(not isinstance(weight, int) or weight < 0 for weight in weights) or not any(weights):
            raise DataError(
                f"mixture weights {tuple(weights)!r} must be integers ≥ 0 with one above 0"
            )
        divisor = math.gcd(*weights)
        self._weights = np.array([weight // divisor for weight in weights], dtype=np.int64)
        self._size = int(self._weights.sum())
        if self._size > MAX_BLOCK:
            raise DataError(
                f"mixture weights {tuple(weights)!r} sum to {self._size} after reduction; use "
                f"smaller integers (at most {MAX_BLOCK} together)"
            )
        self._key = np.uint64(key)
        # By largest deficit, the first of equals: in plain integers, for a block may be long.
        reduced = self._weights.tolist()
        table, deficits = [0] * self._size, [0] * len(reduced)
        for slot in range(self._size):
            deficits = [a + b for a, b in zip(deficits, reduced, strict=True)]
            table[slot] = source = deficits.index(max(deficits))
            deficits[source] -= self._size
        self._table = np.array(table, dtype=np.int64)
        self._prefix = np.zeros((len(reduced), self._size + 1), dtype=np.int64)
        np.cumsum(self._table == np.arange(len(reduced))[:, None], axis=1, out=self._prefix[:, 1:])

    def _rotation(self, block: Int64Array) -> Int64Array:
        mixed = mix64(block.astype(np.uint64) ^ self._key)
        return (mixed % np.uint64(self._size)).astype(np.int64)

    def locate(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        block, place = np.divmod(samples, self._size)
        first = self._rotation(block)
        slot = (first + place) % self._size
        source = self._table[slot]
        weight = self._weights[source]
        within = self._prefix[source, slot] - self._prefix[source, first]
        within += np.where(slot < first, weight, 0)
        return source, block * weight + within

    def counts(self, n_samples: int) -> Int64Array:
        block, place = divmod(n_samples, self._size)
        first = int(self._rotation(np.array([block], dtype=np.int64))[0])
        slot = first + place
        partial = self._prefix[:, min(slot, self._size)] - self._prefix[:, first]
        if slot > self._size:
            partial = partial + self._prefix[:, slot - self._size]
        counts: Int64Array = block * self._weights + partial
        return counts
