"""How far a preparation is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Meter", "Progress", "ProgressCallback"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Plain numbers for a progress bar. All counts only grow within one call."""

    stage: str
    """`"download"`, `"encode"`, `"pack"` or `"done"`."""
    tokens: int
    """Tokens encoded so far, end-of-text included, resumed work included."""
    documents: int
    """Documents encoded so far."""
    bytes_done: int
    """Input bytes (uncompressed) encoded so far."""
    bytes_total: int
    """Input bytes (uncompressed) known so far; from the hub it grows file by file."""
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    """`tokens` per source name."""
    target_tokens: int | None = None
    """Tokens asked for, if a number was."""
    note: str = ""
    """What is being waited for, such as a hub that does not answer; empty otherwise."""


ProgressCallback = Callable[[Progress], None]


class Meter:
    """Sums finished parts and reports them to a callback."""

    def __init__(self, callback: ProgressCallback | None, target_tokens: int | None = None) -> None:
        self._callback = callback
        self._target_tokens = target_tokens
        self._source_tokens: dict[str, int] = {}
        self._documents = self._bytes_done = self._bytes_total = 0

    def expect(self, source: str, input_bytes: int) -> None:
        """Count a unit of `input_bytes` to the total."""
        self._source_tokens.setdefault(source, 0)
        self._bytes_total += input_bytes

    def finish(self, source: str, input_bytes: int, tokens: int, documents: int) -> None:
        """Count a unit as done."""
        self._source_tokens[source] = self._source_tokens.get(source, 0) + tokens
        self._documents += documents
        self._bytes_done += input_bytes

    def report(self, stage: str, note: str = "") -> None:
        """Tell the callback."""
        if self._callback is not None:
            self._callback(
                Progress(
                    stage=stage,
                    tokens=sum(self._source_tokens.values()),
                    documents=self._documents,
                    bytes_done=self._bytes_done,
                    bytes_total=self._bytes_total,
                    source_tokens=dict(self._source_tokens),
                    target_tokens=self._target_tokens,
                    note=note,
                )
            )
