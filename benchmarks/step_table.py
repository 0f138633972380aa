"""The table of `step.py`, for a terminal and for a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLUMNS = (
    "case", "optimizer", "micro-batches", "tokens/s", "MFU (PaLM)", "MFU (causal)", "ms a step",
    "peak GiB", "first step, s",
)  # fmt: skip

TOKENS = {"random": "one batch of random tokens in every step", "text": "fresh text in every step"}


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["name"], row["optimizer"], row["error"], *[""] * 6]
    palm, causal = (
        f"{100 * row[key]:.1f} %" if row[key] else "–" for key in ("mfu_palm", "mfu_causal")
    )
    return [
        row["name"],
        row["optimizer"],
        _shown_batch(row),
        f"{row['tokens_per_s']:,.0f}",
        palm,
        causal,
        f"{row['step_ms']:.1f} [{row['step_ms_min']:.1f}–{row['step_ms_max']:.1f}]",
        f"{row['peak_gib']:.1f}" if row["peak_gib"] else "–",
        f"{row['to_first_step_s']:.0f}",
    ]


def merge_runs(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The first run's rows; one that failed there is a later run's, and its name says so.

    Boards differ by some percent, so it names the later run's rate of a case of both as well.
    """
    rows = {row["name"]: row for row in runs[0]}
    for later in runs[1:]:
        measured = {row["name"]: row for row in later if "error" not in row}
        both = next((name for name in measured if "error" not in rows.get(name, {"error": ""})), "")
        there = f"; there {both} {measured[both]['tokens_per_s']:,.0f}" if both else ""
        for name, row in measured.items():
            if "error" in rows.get(name, {}):
                rows[name] = row | {"name": f"{name} (another run{there})"}
    return list(rows.values())


def show(rows: list[dict[str, Any]], write: Path | None) -> None:
    """The table for a terminal and, with `--write`, as a section of a Markdown page."""
    table = [list(COLUMNS), *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    measured = [row for row in rows if "error" not in row]
    if not measured:
        return
    first = measured[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["installed"].items())
    print(f"{first['device']}, {versions}")
    if write is None:
        return
    from matilda_train.report.section import replace_section

    tokens = TOKENS[first.get("tokens", "random")]
    lines = ["## Speed of a training step", "", f"`{first['command']}`", ""]
    lines += [
        f"{first['device']}, {versions}; {tokens}, bf16, compiled; median of "
        f"{first['steps']} steps after {first.get('warm_up', 6)}, with the range. A step takes its "
        "optimizer once for all its micro-batches (number × sequences × tokens). First step: "
        "seconds from the start of the process, as many cases compiling at once as `--jobs` says.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
    ]
    replace_section(write, "speed of a step", "\n".join(lines), title="Results")


def _shown_batch(row: dict[str, Any]) -> str:
    return f"{row['micro_batches']}x{row['batch']}x{row['seq_len']}"
