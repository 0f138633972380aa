"""`BinStream`: windows of tokens in an order that is a pure function of the sample number."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.dataset import TokenDataset, open_dataset
from matilda_data.errors import DataError
from matilda_data.manifest import canonical_json
from matilda_data.mixture import Mixture, Phase
from matilda_data.order import ORDER, keys, permute

__all__ = ["BinStream", "batch_sha256"]

FORMAT = "matilda-stream/1"

TokenArray = npt.NDArray[np.uint16]
Int64Array = npt.NDArray[np.int64]


class BinStream:
    """Samples of `seq_len + 1` tokens; inputs are `[:, :-1]` and targets `[:, 1:]`.

    Sample `g` depends on the data set, `seed`, `seq_len` and the mixture alone: O(1) to reach, the
    same for any world size, micro-batch or batch size. Ranks and micro-steps take slices of the
    global sample numbers. The whole state is `next_sample`.

    With `shuffle`, each source gives every one of its `n_tokens // seq_len` windows once an epoch,
    in an order keyed by (data set, seed, source, epoch); window borders move from epoch to epoch,
    and the last window wraps round to the first token. Sources mix by integer weights. Without
    `shuffle`, windows come in file order, source after source: for evaluation.

    Attributes:
        next_sample: THE position; `take` advances it.
        n_windows: windows of one epoch over all sources.
        data_id: identity of the data.
        seq_len, seed, split, shuffle: as given.
    """

    def __init__(
        self,
        dataset: TokenDataset | str | os.PathLike[str],
        *,
        seq_len: int,
        seed: int,
        split: str = "train",
        shuffle: bool = True,
        weights: Mapping[str, int] | None = None,
    ) -> None:
        """Open a stream at sample 0.

        Args:
            dataset: an open data set, or its directory (then `split` of it is opened).
            seq_len: inputs a sample; it holds one token more.
            seed: any integer; other seeds give unrelated orders.
            weights: integer weight for each source name; None takes the manifest's.

        Raises:
            DataError: the data set cannot be opened or is shorter than one sample, or an argument
                is out of range.
        """
        if not isinstance(dataset, TokenDataset):
            dataset = open_dataset(dataset, split)
        if not isinstance(seq_len, int) or seq_len < 1:
            raise DataError(f"`seq_len` is {seq_len!r}; give an integer ≥ 1")
        if not isinstance(seed, int):
            raise DataError(f"`seed` is {seed!r}; give an integer")
        self.dataset = dataset
        self.data_id = dataset.data_id
        self.split = dataset.split
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.next_sample = 0
        self._weights = _resolve_weights(dataset, weights)
        self._sources = [
            source for source, weight in zip(dataset.sources, self._weights, strict=True) if weight
        ]
        spare = 0 if shuffle else 1  # a shuffled source wraps round, a plain one ends
        self._n_windows = [(source.n_tokens - spare) // seq_len for source in self._sources]
        for source in self._sources:
            if source.n_tokens <= seq_len:
                raise DataError(
                    f"source {source.name!r} has {source.n_tokens} {self.split!r} tokens, fewer "
                    f"than one sample of {seq_len + 1}; use a smaller `seq_len` or more text"
                )
        self.n_windows = sum(self._n_windows)
        phase = Phase(start=0, weights=tuple(weight for weight in self._weights if weight))
        self._mixture = Mixture([phase], self.data_id, self.split, seed)
        self._ends = np.cumsum(self._n_windows, dtype=np.int64)
        self._keys: dict[tuple[int, int], npt.NDArray[np.uint64]] = {}

    def windows(self, first: int, count: int, out: TokenArray | None = None) -> TokenArray:
        """uint16[count, seq_len + 1]: the samples `first` to `first + count - 1`.

        A pure function of `first`; `next_sample` neither matters nor moves. `out` receives the
        tokens if given (same shape and dtype) and is returned.

        Raises:
            DataError: a negative number, or a shard proves damaged.
        """
        if first < 0 or count < 0:
            raise DataError(f"samples {first!r} to {first + count!r} do not exist; start at 0")
        shape = (count, self.seq_len + 1)
        if out is None:
            out = np.empty(shape, dtype=np.uint16)
        elif out.shape != shape or out.dtype != np.uint16:
            raise DataError(f"`out` is {out.dtype}{list(out.shape)}; give uint16{list(shape)}")
        source, start = self._locate(np.arange(first, first + count, dtype=np.int64))
        for number in np.unique(source).tolist():
            rows = np.flatnonzero(source == number)
            out[rows] = self._sources[number].gather(start[rows], self.seq_len + 1)
        return out

    def _locate(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        """For each sample its source and its first token's position there."""
        if not self.shuffle:
            window = samples % self.n_windows
            source = np.searchsorted(self._ends, window, side="right").astype(np.int64)
            begin = self._ends[source] - np.array(self._n_windows, dtype=np.int64)[source]
            return source, (window - begin) * self.seq_len
        source, index = self._mixture.locate(samples)
        start = np.empty_like(index)
        for number in np.unique(source).tolist():
            rows = source == number
            n_windows, n_tokens = self._n_windows[number], self._sources[number].n_tokens
            epoch, window = np.divmod(index[rows], n_windows)
            first_token = np.empty_like(window)
            for each in np.unique(epoch).tolist():
                members = epoch == each
                key = self._key(number, each)
                border = int(key[8]) % n_tokens
                moved = permute(window[members], n_windows, key) * self.seq_len + border
                first_token[members] = moved % n_tokens
            start[rows] = first_token
        return source, start

    def _key(self, source: int, epoch: int) -> npt.NDArray[np.uint64]:
        """Nine keys: eight for the permutation's rounds, one for the window borders."""
        found = self._keys.get((source, epoch))
        if found is None:
            name = self._sources[source].name
            found = keys(9, "windows", self.data_id, self.split, self.seed, name, epoch)
            if len(self._keys) >= 64:
                self._keys.clear()
            self._keys[source, epoch] = found
        return found

    def take(self, count: int) -> TokenArray:
        """`windows(next_sample, count)`, then `next_sample` advances by `count`."""
        tokens = self.windows(self.next_sample, count)
        self.next_sample += count
        return tokens

    def _identity(self) -> dict[str, Any]:
        mixture = [[s.name, w] for s, w in zip(self.dataset.sources, self._weights, strict=True)]
        return {
            "format": FORMAT,
            "order": ORDER if self.shuffle else "sequential",
            "data_id": self.data_id,
            "split": self.split,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "mixture_sha256": hashlib.sha256(canonical_json(mixture)).hexdigest(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON of a few hundred bytes: what the order depends on, and `next_sample`."""
        return {**self._identity(), "next_sample": self.next_sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, on any number of ranks.

        Raises:
            DataError: the state belongs to other data, another seed, sequence length or mixture;
                the message names the field and both values. The stream is unchanged.
        """
        for field, mine in self._identity().items():
            if state.get(field) != mine:
                raise DataError(
                    f"the saved stream has `{field}` {state.get(field)!r} and this one {mine!r}; "
                    f"resume with the same data and settings, or start a new run"
                )
        position = state.get("next_sample")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise DataError(f"the saved stream has `next_sample` {position!r}; it is damaged")
        self.next_sample = position

    def __repr__(self) -> str:
        return (
            f"BinStream(data_id={self.data_id[:12]!r}, split={self.split!r}, "
            f"seq_len={self.seq_len}, seed={self.seed}, next_sample={self.next_sample})"
        )


def _resolve_weights(dataset: TokenDataset, weights: Mapping[str, int] | None) -> Sequence[int]:
    if weights is None:
        return [source.weight for source in dataset.sources]
    names = [source.name for source in dataset.sources]
    for name in weights:
        if name not in names:
            raise DataError(f"no source {name!r} in the data set; it has {', '.join(names)}")
    return [weights.get(name, 0) for name in names]


def batch_sha256(tokens: npt.ArrayLike) -> str:
    """Hexadecimal SHA-256 of `tokens` as little-endian uint16 bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u2").data.cast("B")).hexdigest()
