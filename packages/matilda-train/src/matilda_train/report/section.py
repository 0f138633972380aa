"""Sections of a Markdown page that programs write, each between two marks, the rest by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matilda_train.run_dir import write_output

__all__ = ["describe_provenance", "replace_section"]


def replace_section(page: str | Path, name: str, text: str, *, title: str = "") -> Path:
    """Put `text` between the marks `<!-- name -->` and `<!-- /name -->` of a page, whole or not.

    A page without the marks gets the section at its end; one that does not exist is made, with
    `title` as its heading. Raises `ValueError` where only one of the marks is there.
    """
    page = Path(page)
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before = page.read_text(encoding="utf-8") if page.is_file() else f"# {title or page.stem}\n"
    section = f"{begin}\n{text.strip()}\n{end}"
    if begin in before and end in before.partition(begin)[2]:
        head, _, rest = before.partition(begin)
        after = head + section + rest.partition(end)[2]
    elif begin in before or end in before:
        raise ValueError(
            f"{str(page)!r} has only one of the marks {begin} and {end}; put the other back, or "
            "take both out."
        )
    else:
        after = f"{before.rstrip()}\n\n{section}\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_output(page, after)
    return page


def describe_provenance(provenance: Mapping[str, Sequence[Any]]) -> str:
    """Commit, hardware, versions, data and date in one sentence's end."""
    hashes = ("git_sha", "data_id")
    known = {
        name: ", ".join(
            str(value)[: 12 if name in hashes else None] for value in values if value is not None
        )
        or "unknown"
        for name, values in provenance.items()
    }
    changed = " and uncommitted changes" if True in provenance.get("uncommitted", []) else ""
    on_gpu = known.get("cuda") != "unknown" and known["device"] != "cpu"
    cuda = f", CUDA {known['cuda']}" if on_gpu else ""
    return (
        f"commit {known['git_sha']}{changed}, {known['device']}, torch {known['torch']}"
        f"{cuda}, Python {known['python']}, data set {known['data_id']}, "
        f"on {known['dates']} (UTC)"
    )
