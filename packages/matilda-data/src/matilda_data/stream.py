"""`BinStream`: windows of tokens in an order that is a pure function of the sample number."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.dataset import TokenDataset, TokenSource, open_dataset
from matilda_data.errors import DataError
from matilda_data.integers import plain_integer
from matilda_data.manifest import canonical_json
from matilda_data.mixture import Mixture, Phase, distinct
from matilda_data.order import ORDER, keys, permute
from matilda_data.packing import PACKING, PackedRows, Packing, describe_rows, pack_documents
from matilda_data.skipping import SkipMap

__all__ = ["BinStream", "batch_sha256", "cu_seqlens"]

FORMAT = "matilda-stream/1"
ROWS = ("windows", "documents")
CACHED_KEYS = 256
MAX_SAMPLES = 2**62
# Orders are computed for aligned blocks of samples: numpy's cost is by call, not by number.
BLOCK, CACHED_BLOCKS = 1024, 4

TokenArray = npt.NDArray[np.uint16]
Int64Array = npt.NDArray[np.int64]
Weights = Mapping[str, int]


class BinStream:
    """Samples of `seq_len + 1` tokens; inputs are `[:, :-1]` and targets `[:, 1:]`.

    Sample `g` depends on the data set, `seed`, `seq_len` and the mixture alone: O(1) to reach, the
    same for any world size, micro-batch or batch size. Ranks and micro-steps take slices of the
    global sample numbers. The whole state is `next_sample`.

    With `shuffle`, each source gives every one of its `n_tokens // seq_len` windows once an epoch,
    in an order keyed by (data set, seed, source, epoch); window borders move from epoch to epoch,
    and the last window wraps round to the first token. Sources mix by integer weights. Without
    `shuffle`, they come in file order, source after source, whatever the weights: for evaluation.

    Attributes:
        next_sample: THE position; `take` advances it.
        n_windows: windows of one epoch over all sources.
        data_id: identity of the data.
        dataset, seq_len, seed, split, shuffle, max_repeats: as given.
    """

    def __init__(
        self,
        dataset: TokenDataset | str | os.PathLike[str],
        *,
        seq_len: int,
        seed: int,
        split: str = "train",
        shuffle: bool = True,
        weights: Weights | Sequence[tuple[int, Weights]] | None = None,
        skip: Sequence[tuple[int, int]] = (),
        max_repeats: int | None = None,
        rows: str = "windows",
    ) -> None:
        """Open a stream at sample 0.

        Args:
            dataset: an open data set, or its directory (then `split` of it is opened).
            seq_len: inputs a sample; it holds one token more.
            seed: any integer; other seeds give unrelated orders.
            split: `"train"` or `"val"`, for a directory.
            shuffle: False for file order.
            weights: integer weight for each source name (sources not named are left out); a list
                of (first sample, weights) changes the mixture on the way, for annealing; None
                takes the manifest's weights. Without `shuffle` they only choose sources.
            skip: half-open intervals of sample numbers to leave out, as after a loss spike.
            max_repeats: refuse samples past this many epochs of any source.
            rows: `"windows"`, or `"documents"` for rows of whole documents, packed; then an epoch
                is every packed row once, and `packed` gives their boundaries.

        Raises:
            DataError: the data set cannot be opened or is shorter than one sample, or an argument
                is out of range.
        """
        if not isinstance(dataset, TokenDataset):
            dataset = open_dataset(dataset, split)
        seq_len, seed = plain_integer("seq_len", seq_len, 1), plain_integer("seed", seed)
        if max_repeats is not None:
            max_repeats = plain_integer("max_repeats", max_repeats, 1)
        if rows not in ROWS:
            raise DataError(f"`rows` is {rows!r}; choose one of {', '.join(map(repr, ROWS))}")
        self.dataset = dataset
        self.data_id = dataset.data_id
        self.split = dataset.split
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.max_repeats = max_repeats
        self.rows = rows
        self.next_sample = 0
        phases = _resolve_phases(dataset, weights)
        used = [any(phase[1][number] for phase in phases) for number in range(len(dataset.sources))]
        self._sources = [s for s, wanted in zip(dataset.sources, used, strict=True) if wanted]
        self._mixture_id = [[source.name for source in dataset.sources], phases]
        self._skip = SkipMap(skip)
        self._packings: list[Packing] = []
        if rows == "documents":
            self._packings = [_pack_source(source, seq_len) for source in self._sources]
        spare = 0 if shuffle else 1  # a shuffled source wraps round, a plain one ends
        self._n_windows = np.array(
            [packing.n_rows for packing in self._packings]
            or [(source.n_tokens - spare) // seq_len for source in self._sources],
            dtype=np.int64,
        )
        for source in self._sources:
            if source.n_tokens <= seq_len and rows == "windows":
                raise DataError(
                    f"source {source.name!r} has {source.n_tokens} {self.split!r} tokens, fewer "
                    f"than one sample of {seq_len + 1}; use a smaller `seq_len` or more text"
                )
        self.n_windows = int(self._n_windows.sum())
        self._mixture = Mixture(
            [
                Phase(
                    start=start,
                    weights=tuple(w for w, wanted in zip(row, used, strict=True) if wanted),
                )
                for start, row in phases
            ],
            self.data_id,
            self.split,
            seed,
        )
        self._ends = np.cumsum(self._n_windows, dtype=np.int64)
        self._keys: dict[tuple[int, int], npt.NDArray[np.uint64]] = {}
        self._blocks: dict[int, tuple[Int64Array, Int64Array]] = {}

    def windows(self, first: int, count: int, out: TokenArray | None = None) -> TokenArray:
        """uint16[count, seq_len + 1]: the samples `first` to `first + count - 1`.

        A pure function of `first`; `next_sample` neither matters nor moves. `out` receives the
        tokens if given (same shape and dtype) and is returned.

        Raises:
            DataError: a negative number, samples past `max_repeats`, or a damaged shard.
        """
        source, start = self.positions(first, count)
        shape = (count, self.seq_len + 1)
        if out is None:
            out = np.empty(shape, dtype=np.uint16)
        elif out.shape != shape or out.dtype != np.uint16:
            raise DataError(f"`out` is {out.dtype}{list(out.shape)}; give uint16{list(shape)}")
        places = enumerate(zip(source.tolist(), start.tolist(), strict=True))
        if self._packings:
            for row, (number, first_row) in places:
                self._fill_packed(number, first_row, out[row])
        else:
            for row, (number, first_token) in places:
                self._sources[number].read_row(first_token, out, row)
        return out

    def _fill_packed(self, source: int, row: int, out: TokenArray) -> None:
        """Copy the segments of a packed row; end-of-text fills the rest."""
        filled = 0
        for start, length in self._packings[source].segments(row):
            self._sources[source].read_into(start, out[filled : filled + length])
            filled += length
        out[filled:] = self.dataset.eot_id

    def packed(self, first: int, count: int) -> PackedRows:
        """`windows(first, count)` with the boundaries of its documents and a loss mask.

        With rows of windows, every end-of-text token begins a sequence and every target counts.
        """
        tokens = self.windows(first, count)
        if self._packings:
            return describe_rows(tokens, [self.segments(first + i)[1] for i in range(count)])
        inputs = tokens[:, :-1]
        mask = np.ones(inputs.shape, dtype=np.bool_)
        return PackedRows(tokens, cu_seqlens(inputs, self.dataset.eot_id), mask)

    def segments(self, sample: int) -> tuple[int, list[tuple[int, int]]]:
        """What a sample is made of: a number into `source_names`, and the (first token, tokens)
        of each run of that source's tokens."""
        numbers, starts = self.positions(sample, 1)
        source, start = int(numbers[0]), int(starts[0])
        if self._packings:
            return source, self._packings[source].segments(start)
        return source, [(start, self.seq_len + 1)]

    def positions(self, first: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Where samples come from: int64[count] numbers into `source_names`, and int64[count]
        positions of their first tokens among that source's tokens (row numbers when packed)."""
        if first < 0 or count < 0 or first + count > MAX_SAMPLES:
            raise DataError(
                f"samples {first!r} to {first + count!r} do not exist; give numbers from 0 to "
                f"{MAX_SAMPLES}"
            )
        if not 0 < count <= BLOCK or self.max_repeats is not None:
            return self._locate(first, count)
        number, place = divmod(first, BLOCK)
        source, start = self._block(number)
        if place + count <= BLOCK:
            return source[place : place + count], start[place : place + count]
        more_source, more_start = self._block(number + 1)
        rest = place + count - BLOCK
        return (
            np.concatenate([source[place:], more_source[:rest]]),
            np.concatenate([start[place:], more_start[:rest]]),
        )

    def _block(self, number: int) -> tuple[Int64Array, Int64Array]:
        """`_locate` for an aligned block of samples, the last few blocks kept."""
        found = self._blocks.get(number)
        if found is None:
            found = self._locate(number * BLOCK, BLOCK)
            for array in found:
                array.setflags(write=False)  # callers get views
            if len(self._blocks) >= CACHED_BLOCKS:
                self._blocks.clear()
            self._blocks[number] = found
        return found

    def _locate(self, first: int, count: int) -> tuple[Int64Array, Int64Array]:
        samples = self._skip.original(np.arange(first, first + count, dtype=np.int64))
        if not self.shuffle:
            epoch, window = np.divmod(samples, self.n_windows)
            self._check_repeats(epoch, "the data")
            source = np.searchsorted(self._ends, window, side="right").astype(np.int64)
            begin = self._ends[source] - self._n_windows[source]
            return source, (window - begin) * (1 if self._packings else self.seq_len)
        source, index = self._mixture.locate(samples)
        start = np.empty_like(index)
        for number in distinct(source):
            rows = source == number
            start[rows] = self._shuffled(number, index[rows])
        return source, start

    def _shuffled(self, source: int, index: Int64Array) -> Int64Array:
        """First tokens of a source's windows `index`, counted over epochs."""
        n_windows, n_tokens = int(self._n_windows[source]), self._sources[source].n_tokens
        epoch, window = np.divmod(index, n_windows)
        self._check_repeats(epoch, f"source {self._sources[source].name!r}")
        start = np.empty_like(window)
        for each in distinct(epoch):
            members = epoch == each
            key = self._key(source, each)
            place = permute(window[members], n_windows, key)
            if not self._packings:
                place = (place * self.seq_len + int(key[8]) % n_tokens) % n_tokens
            start[members] = place
        return start

    def _check_repeats(self, epoch: Int64Array, what: str) -> None:
        if self.max_repeats is not None and (epoch >= self.max_repeats).any():
            raise DataError(
                f"{what} is used up after {self.max_repeats} epochs (`max_repeats`); prepare more "
                "text, lower its weight or allow more repeats"
            )

    def _key(self, source: int, epoch: int) -> npt.NDArray[np.uint64]:
        """Nine keys: eight for the permutation's rounds, one for the window borders."""
        found = self._keys.get((source, epoch))
        if found is None:
            name = self._sources[source].name
            found = keys(9, "windows", self.data_id, self.split, self.seed, name, epoch)
            if len(self._keys) >= CACHED_KEYS:
                self._keys.clear()
            self._keys[source, epoch] = found
        return found

    def original(self, first: int, count: int) -> tuple[int, int]:
        """The half-open interval of the unskipped order that `count` samples from `first` on span:
        what `skip` and `leave_out` take."""
        ends = self._skip.original(np.array([first, first + count - 1], dtype=np.int64))
        return int(ends[0]), int(ends[1]) + 1

    def leave_out(self, first: int, stop: int) -> None:
        """Skip the interval [first, stop) of the unskipped order too, as if `skip` had named it.

        Meant for samples ahead; `load_state_dict` refuses a state that has passed them. No other
        thread may be reading.
        """
        self._skip = SkipMap([*self._skip.intervals, (first, stop)])
        self._blocks.clear()

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources in use; `positions` gives numbers into it."""
        return tuple(source.name for source in self._sources)

    def epochs(self, samples: int | None = None) -> dict[str, float]:
        """How often each source has been read after `samples` samples (None: `next_sample`)."""
        used = self.next_sample if samples is None else samples
        last = int(self._skip.original(np.array([max(used - 1, 0)], dtype=np.int64))[0])
        total = last + 1 if used else 0
        if self.shuffle:
            counts = self._mixture.counts(total)
        else:
            epoch, window = divmod(total, self.n_windows)
            begins = self._ends - self._n_windows
            counts = epoch * self._n_windows + np.clip(window - begins, 0, self._n_windows)
        return dict(zip(self.source_names, (counts / self._n_windows).tolist(), strict=True))

    def take(self, count: int) -> TokenArray:
        """`windows(next_sample, count)`, then `next_sample` advances by `count`."""
        tokens = self.windows(self.next_sample, count)
        self.next_sample += count
        return tokens

    def check_untouched(self) -> None:
        """`TokenDataset.check_untouched` of the data set behind it."""
        self.dataset.check_untouched()

    def _identity(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "order": ORDER if self.shuffle else "sequential",
            "rows": PACKING if self._packings else "windows",
            "data_id": self.data_id,
            "split": self.split,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "mixture_sha256": hashlib.sha256(canonical_json(self._mixture_id)).hexdigest(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON of a few hundred bytes: what the order depends on, and `next_sample`."""
        skip = [list(interval) for interval in self._skip.intervals]
        return {**self._identity(), "skip": skip, "next_sample": self.next_sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, on any number of ranks.

        This stream may skip other samples than the saved one did, as long as those lie ahead.

        Raises:
            DataError: the state belongs to other data, another seed, sequence length or mixture;
                the message names the field and both values. The stream is unchanged.
        """
        for field, mine in self._identity().items():
            if state.get(field) != mine:
                raise DataError(
                    f"the saved stream has `{field}` {state.get(field)!r} and this one {mine!r}; "
                    "resume with the same data and settings, or start a new run"
                )
        position = state.get("next_sample")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise DataError(f"the saved stream has `next_sample` {position!r}; it is damaged")
        passed = SkipMap(state.get("skip", ())).before(position)
        if passed != self._skip.before(position):
            raise DataError(
                f"the saved stream has passed `skip` intervals {passed!r} and this one would have "
                f"passed {self._skip.before(position)!r}; only samples ahead of {position} can be "
                "skipped anew"
            )
        self.next_sample = position

    def __repr__(self) -> str:
        return (
            f"BinStream(data_id={self.data_id[:12]!r}, split={self.split!r}, "
            f"seq_len={self.seq_len}, seed={self.seed}, next_sample={self.next_sample})"
        )


def _resolve_phases(
    dataset: TokenDataset, weights: Weights | Sequence[tuple[int, Weights]] | None
) -> list[tuple[int, list[int]]]:
    """(first sample, one weight for each source of the data set) rows."""
    if weights is None:
        return [(0, [source.weight for source in dataset.sources])]
    names = [source.name for source in dataset.sources]
    rows = [(0, weights)] if isinstance(weights, Mapping) else list(weights)
    for pair in rows:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Mapping):
            raise DataError(
                f"`weights` is {weights!r}; give a weight for each source by name, or a list of "
                "(first sample, such weights)"
            )
    for _, row in rows:
        for name in row:
            if name not in names:
                raise DataError(f"no source {name!r} in the data set; it has {', '.join(names)}")
    if not any(weight for _, row in rows for weight in row.values()):
        raise DataError(f"mixture weights {weights!r} take nothing; give one source 1 or more")
    return [
        (
            plain_integer("weights: first sample", start),
            [_weight(row.get(name, 0)) for name in names],
        )
        for start, row in rows
    ]


def _weight(value: object) -> Any:
    """As a plain integer if it is one; `Mixture` refuses the rest."""
    return int(value) if isinstance(value, np.integer) else value


def _pack_source(source: TokenSource, seq_len: int) -> Packing:
    if source.index is None:
        raise DataError(
            f"source {source.name!r} has no document index to pack by; import its shards with: "
            "matilda-data convert"
        )
    return pack_documents(source.index.starts(), source.n_tokens, seq_len + 1)


def cu_seqlens(inputs: TokenArray, eot_id: int) -> npt.NDArray[np.int32]:
    """Boundaries for attention inside documents, in the form of variable-length flash attention.

    Args:
        inputs: uint16[B, T] input tokens; row and document starts begin a sequence.
        eot_id: the token that begins each document.

    Returns:
        int32[n + 1]: sequence i is `inputs.reshape(-1)[cu[i] : cu[i + 1]]`; `cu[-1]` is B × T.
    """
    starts = inputs == eot_id
    starts[:, 0] = True
    return np.append(np.flatnonzero(starts.reshape(-1)), inputs.size).astype(np.int32)


def batch_sha256(tokens: npt.ArrayLike) -> str:
    """Hexadecimal SHA-256 of `tokens` as little-endian uint16 bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u2").data.cast("B")).hexdigest()
