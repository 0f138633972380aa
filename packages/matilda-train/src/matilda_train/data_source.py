"""Where a run's tokens come from: a prepared data set, a corpus made on the spot, or noise."""

from __future__ import annotations

import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from matilda_data import (
    BinStream,
    DataError,
    Manifest,
    Progress,
    TokenDataset,
    open_dataset,
    prepare_text,
)
from matilda_train.config import DataConfig, RunConfig
from matilda_train.console import Display

__all__ = [
    "PreparationStoppedError",
    "SyntheticStream",
    "TokenStream",
    "open_streams",
    "prepare_corpus",
    "prepare_with_display",
]

# Parts of the standard library that are data or tests rather than code worth imitating.
STDLIB_EXCLUDED = (
    "__pycache__",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
)


class TokenStream(Protocol):
    """What the loop needs of a stream: windows by position, and the position."""

    next_sample: int

    @property
    def data_id(self) -> str: ...

    @property
    def n_windows(self) -> int: ...

    def windows(self, first: int, count: int) -> NDArray[np.uint16]: ...

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

    @classmethod
    def pair(cls, vocab_size: int, seq_len: int) -> tuple[SyntheticStream, SyntheticStream]:
        """A training stream and a held-out one."""
        return (
            cls(vocab_size=vocab_size, seq_len=seq_len, seed=0),
            cls(vocab_size=vocab_size, seq_len=seq_len, seed=1),
        )

    def windows(self, first: int, count: int) -> NDArray[np.uint16]:
        """uint16[count, seq_len + 1]."""
        generator = np.random.Generator(np.random.PCG64([self._seed, first]))
        shape = (count, self._seq_len + 1)
        return generator.integers(0, self._vocab_size, shape, dtype=np.uint16)

    def state_dict(self) -> dict[str, Any]:
        return {"data_id": self.data_id, "next_sample": self.next_sample}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next_sample = int(state["next_sample"])


class PreparationStoppedError(RuntimeError):
    """A signal stopped data preparation; rerunning the command goes on from there."""


def prepare_corpus(
    config: DataConfig, data_dir: Path, *, stop: Callable[[], bool], display: Display
) -> None:
    """Prepare `data.corpus` in `data_dir`, unless a finished data set is there.

    Returns early, with the work so far kept, once `stop()` is true.
    """
    with suppress(DataError):  # unfinished, missing or damaged: the calls below say which
        open_dataset(data_dir)
        return
    library = Path(sysconfig.get_paths()["stdlib"])
    if not (library / "abc.py").is_file():
        raise ValueError(
            f"The standard library of {sys.executable!r} has no .py sources in {str(library)!r}; "
            "use a Python that ships them, or prepare another corpus with `apps/prepare_text.py`."
        )
    with suppress(PreparationStoppedError):
        prepare_with_display(
            [library],
            data_dir,
            stop=stop,
            display=display,
            tokenizer=config.tokenizer,
            val_fraction=0.05,
            exclude=STDLIB_EXCLUDED,
            include=lambda name: name.endswith(".py"),
        )


def prepare_with_display(
    inputs: Sequence[str | Path],
    out_dir: Path,
    *,
    stop: Callable[[], bool],
    display: Display,
    **options: Any,
) -> Manifest:
    """`matilda_data.prepare_text` with a progress line.

    Raises `PreparationStoppedError` once `stop()` is true; what was done is kept.
    """
    began = time.monotonic()
    first: Progress | None = None

    def report(progress: Progress) -> None:
        nonlocal first
        if stop():
            raise PreparationStoppedError(
                f"Stopped after {progress.tokens:,} tokens; run the same command again to go on."
            )
        if first is None:
            first = progress
            display.begin("preparing data", total=progress.bytes_total, done=progress.bytes_done)
        rate = (progress.tokens - first.tokens) / max(time.monotonic() - began, 1e-9)
        display.advance(progress.bytes_done, f"{progress.tokens:,} tokens · {rate:,.0f} tokens/s")

    return prepare_text(inputs, out_dir, progress=report, **options)


def open_streams(config: RunConfig, data_dir: Path) -> tuple[BinStream, BinStream]:
    """The shuffled training stream and the sequential held-out stream of one data set.

    Raises `ValueError` when the data set is missing, damaged or unfinished, was made with another
    tokenizer than the config names, has more token ids than the model, or is too small.
    """
    if not data_dir.exists():
        raise ValueError(
            f"Data set {str(data_dir)!r} does not exist; prepare one with `uv run "
            f"apps/prepare_text.py --input GLOB --out-dir {data_dir} --tokenizer "
            f"{config.data.tokenizer}`, or try the config with `--dry-run`."
        )
    train, held_out = open_dataset(data_dir, split="train"), open_dataset(data_dir, split="val")
    _check_vocabulary(config, train, data_dir)
    streams = (
        BinStream(train, seq_len=config.seq_len, seed=config.data.seed),
        BinStream(held_out, seq_len=config.seq_len, seed=config.data.seed, shuffle=False),
    )
    for stream, split in zip(streams, ("training", "held-out"), strict=True):
        if stream.n_windows < 1:
            raise ValueError(
                f"The {split} part of {str(data_dir)!r} has fewer tokens than one sequence of "
                f"{config.seq_len + 1}; prepare more text, or lower `train.seq_len`."
            )
    return streams


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
