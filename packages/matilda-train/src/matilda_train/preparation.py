"""Preparing a data set with a progress line, and the corpus that every Python brings along."""

from __future__ import annotations

import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from matilda_data import DataError, Manifest, Progress, open_dataset, prepare_text
from matilda_train.config import DataConfig
from matilda_train.console import Display

__all__ = ["PreparationStoppedError", "prepare_corpus", "prepare_with_display"]

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
