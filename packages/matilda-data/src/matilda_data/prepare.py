"""Text files to a data set: `prepare_text`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matilda_data.manifest import Manifest

__all__ = ["Progress", "TextSource", "prepare_text"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a preparation is; plain numbers for a progress bar. All counts only grow."""

    stage: str
    """`"encode"`, `"pack"` or `"done"`."""
    tokens: int
    """Tokens encoded so far, end-of-text included, resumed work included."""
    documents: int
    """Documents encoded so far."""
    bytes_done: int
    """Input bytes (uncompressed) encoded so far."""
    bytes_total: int
    """Input bytes (uncompressed) in all."""
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    """`tokens` per source name."""


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A named part of a mixture."""

    name: str
    """Letters, digits, `-` and `.`; part of shard file names."""
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    """Files, directories and globs, as in `prepare_text`."""
    weight: int = 1
    """Integer weight in the default mixture."""


def prepare_text(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Sequence[TextSource],
    out_dir: str | os.PathLike[str],
    *,
    tokenizer: str = "gpt2",
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.01,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    exclude: Sequence[str] = (),
    include: Callable[[str], bool] | None = None,
    root: str | os.PathLike[str] | None = None,
    command: str | None = None,
) -> Manifest:
    """Write `inputs` as verified uint16 shards with a manifest into `out_dir`."""
    raise NotImplementedError
