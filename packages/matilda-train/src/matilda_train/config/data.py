"""The `data` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from."""

    dir: str | None = None
    """Folder of a prepared data set (`manifest.json` beside its shards); `--data-dir` sets it."""

    tokenizer: Literal["byte", "gpt2"] = "gpt2"
    """Tokenizer the data set must have been prepared with."""

    corpus: Literal["python-stdlib"] | None = None
    """Corpus to prepare when `dir` is missing: the source of Python's own standard library needs
    no download. null: the data set must exist, as one that `--data-dir` names always must."""

    seed: int = 0
    """Seed of the order in which training windows are visited."""

    mix: tuple[str, ...] = ()
    """Weights of the data set's sources, as in `["prose=83,code=17"]`; empty takes those it was
    prepared with. Further entries hold from a point on: `"900: prose=1,code=1"` after step 900,
    `"1B tokens: prose=1,code=1"` after a billion tokens."""
