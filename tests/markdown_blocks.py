"""Code blocks of the Markdown files, and the commands in them.

A fence marked `sh` or `python` is code that runs as it stands. What it needs beyond this machine is
said in a comment before it: `<!-- needs: gpu -->`, `network`, `time` (many minutes), `cluster`, or
`files` (a run or a data set that whoever made the page had).
Fences without a language are text.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"gpu", "network", "time", "cluster", "files"}
FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>[a-z, ]+) -->\n+)?```(?P<language>\w*)\n(?P<text>.*?)^```",
    re.S | re.M,
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    file: Path
    line: int
    language: str
    needs: frozenset[str]
    text: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The words of each simple command, comments left out."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), ";"]:
                if word not in ("&&", "||", "|", ";"):
                    words.append(word)
                elif words:
                    yield words
                    words = []


def markdown_files() -> list[Path]:
    patterns = (
        "README.md",
        "docs/**/*.md",
        "launchers/README.md",
        "packages/*/README.md",
        "packages/*/docs/*.md",
    )
    return sorted(file for pattern in patterns for file in ROOT.glob(pattern))


def blocks_of(file: Path) -> Iterator[Block]:
    text = file.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        needs = frozenset(re.findall(r"\w+", match["needs"] or ""))
        line = text.count("\n", 0, match.start("language")) + 1
        yield Block(file, line, match["language"], needs, match["text"])
