"""Where a run's tokens come from: a prepared data set, or noise."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from matilda_data import BinStream, TokenDataset, open_dataset, parse_weights
from matilda_train.config import RunConfig
from matilda_train.duration import Duration
from matilda_train.run_dir import RunDir
from matilda_train.step_plan import parse_point

__all__ = [
    "SyntheticStream",
    "TokenStream",
    "choose_data_dir",
    "makes_corpus",
    "mixture_phases",
    "open_streams",
]


class TokenStream(Protocol):
    """What the loop needs of a stream: windows by position, and the position."""

    next_sample: int

    @property
    def data_id(self) -> str: ...

    @property
    def n_windows(self) -> int: ...

    def windows(self, first: int, count: int) -> NDArray[np.uint16]: ...

    def check_untouched(self) -> None: ...

    def original(self, first: int, count: int) -> tuple[int, int]: ...

    def leave_out(self, first: int, stop: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SyntheticStream:
    """Random tokens, a pure function of (seed, position): for dry runs and calibration."""

    data_id = "synthetic"
    n_windows = 2**31

    def __init__(self, *, vocab_size: int, seq_len: int, seed: int) -> None:
        self.next_sample = 0
        self._vocab_size = vocab_size
        self._seq_len = seq_len
        self._seed = seed
        self._left_out: list[tuple[int, int]] = []

    @classmethod
    def pair(cls, vocab_size: int, seq_len: int) -> tuple[SyntheticStream, SyntheticStream]:
        """A training stream and a held-out one."""
        return (
            cls(vocab_size=vocab_size, seq_len=seq_len, seed=0),
            cls(vocab_size=vocab_size, seq_len=seq_len, seed=1),
        )

    def windows(self, first: int, count: int) -> NDArray[np.uint16]:
        """uint16[count, seq_len + 1]."""
        seeds = [self._seed, self._number(first)]
        generator = np.random.Generator(np.random.PCG64(seeds))
        shape = (count, self._seq_len + 1)
        return generator.integers(0, self._vocab_size, shape, dtype=np.uint16)

    def check_untouched(self) -> None:
        """Noise has no files."""

    def original(self, first: int, count: int) -> tuple[int, int]:
        """The interval that `leave_out` takes for `count` samples from `first` on."""
        return self._number(first), self._number(first + count - 1) + 1

    def leave_out(self, first: int, stop: int) -> None:
        """Skip the samples [first, stop) of the unskipped order."""
        self._left_out = sorted([*self._left_out, (first, stop)])

    def _number(self, sample: int) -> int:
        for first, stop in self._left_out:
            sample += stop - first if sample >= first else 0
        return sample

    def state_dict(self) -> dict[str, Any]:
        return {"data_id": self.data_id, "next_sample": self.next_sample}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next_sample = int(state["next_sample"])


def choose_data_dir(given: str | Path | None, config: RunConfig, run_dir: str | Path) -> Path:
    """The data's folder: given, the config's, that with which the run began, or `data`."""
    recorded = None
    if not (given or config.data.dir) and (Path(run_dir) / "run.json").is_file():
        recorded = RunDir.read(run_dir)["config"].get("data", {}).get("dir")
    return Path(given or config.data.dir or recorded or "data")


def makes_corpus(given: str | Path | None, config: RunConfig) -> bool:
    """Whether `data.corpus` is prepared where it is missing: in the config's own folder alone.

    A folder that was named otherwise is the user's: missing, half-finished or damaged, it is said.
    """
    own = given is None or Path(given) == Path(config.data.dir or "data")
    return config.data.corpus is not None and own


def open_streams(config: RunConfig, data_dir: Path) -> tuple[BinStream, BinStream]:
    """The shuffled training stream and the held-out stream of one data set.

    The held-out stream begins with the windows that `eval.tokens` asks for, spread evenly over the
    held-out text in file order, so that every source has its share of them.

    Raises `ValueError` when the data set is missing, damaged or unfinished, was made with another
    tokenizer than the config names, has more token ids than the model, or is too small.
    """
    if not data_dir.exists():
        raise ValueError(
            f"Data set {str(data_dir)!r} does not exist; prepare one with `uv run "
            f"apps/prepare_text.py --input GLOB --out-dir {shlex.quote(str(data_dir))} --tokenizer "
            f"{config.data.tokenizer}`, or try the config with `--dry-run`."
        )
    train, held_out = open_dataset(data_dir, split="train"), open_dataset(data_dir, split="val")
    _check_vocabulary(config, train, data_dir)
    streams = (
        BinStream(
            train, seq_len=config.seq_len, seed=config.data.seed, weights=mixture_phases(config)
        ),
        _spread(held_out, config.seq_len, config.eval.tokens // config.seq_len),
    )
    for stream, split, more in (
        (streams[0], "training", "more text"),
        (streams[1], "held-out", "more text, or with a larger `--val-fraction`"),
    ):
        if stream.n_windows < 1:
            raise ValueError(
                f"The {split} part of {str(data_dir)!r} has fewer tokens than one sequence of "
                f"{config.seq_len + 1}; prepare {more}, or lower `train.seq_len`."
            )
    return streams


def _spread(held_out: TokenDataset, seq_len: int, windows: int) -> BinStream:
    """Of the held-out windows in file order, `windows` at even distances; all where none is left
    out. `n_windows` counts all of them."""
    whole = BinStream(held_out, seq_len=seq_len, seed=0, shuffle=False)
    kept = range(min(max(windows, 1), whole.n_windows))
    places = [number * whole.n_windows // len(kept) for number in kept]
    gaps = [
        (place + 1, following)
        for place, following in zip(places, [*places[1:], whole.n_windows], strict=True)
        if place + 1 < following
    ]
    return BinStream(held_out, seq_len=seq_len, seed=0, shuffle=False, skip=gaps) if gaps else whole


def mixture_phases(config: RunConfig) -> list[tuple[int, dict[str, int]]] | None:
    """`data.mix` as (first sample, weights) of each phase; None where it is empty."""
    plan, phases = config.plan, []
    for entry in config.data.mix:
        text, colon, weights = entry.rpartition(":")
        point = parse_point(text, "data.mix") if colon else Duration(0, "steps")
        try:
            parsed = parse_weights(weights.strip())
        except ValueError as error:
            raise ValueError(f"`data.mix`: {error}") from None
        if min(parsed.values()) < 0 or max(parsed.values()) == 0:
            raise ValueError(
                f"`data.mix` has {entry!r}, but weights must be 0 or more, and one above 0."
            )
        phases.append((plan.samples(plan.step_at(point)), parsed))
    return phases or None


def _check_vocabulary(config: RunConfig, dataset: TokenDataset, data_dir: Path) -> None:
    if dataset.tokenizer_name != config.data.tokenizer:
        raise ValueError(
            f"Data set {str(data_dir)!r} was made with the {dataset.tokenizer_name!r} tokenizer, "
            f"but `data.tokenizer` is {config.data.tokenizer!r}; set it to the former, or prepare "
            "the data again."
        )
    if dataset.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"Data set {str(data_dir)!r} has {dataset.vocab_size} token ids, but "
            f"`model.vocab_size` is {config.model.vocab_size}; raise it to at least that."
        )
