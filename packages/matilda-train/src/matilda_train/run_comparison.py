"""What two runs that should be one and the same differ in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matilda_train.metrics_log import MACHINE_FIELDS, read_rows

__all__ = ["compare", "state_hashes", "untimed_rows"]


def state_hashes(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every tensor and value in a run's newest checkpoint, by its path in the state."""
    import torch

    from matilda_ckpt import Checkpointer
    from matilda_train.state_digest import leaves

    hashes: dict[str, str] = {}
    for name, value in leaves(Checkpointer(run_dir / "checkpoints", read_only=True).load_state()):
        if isinstance(value, torch.Tensor):
            head = f"{value.dtype} {tuple(value.shape)}".encode()
            raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            hashes[name] = hashlib.sha256(head + raw.tobytes()).hexdigest()
        else:
            hashes[name] = hashlib.sha256(repr(value).encode()).hexdigest()
    return hashes


def untimed_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Every metrics row of a run without what clocks, allocator and kills decide."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in MACHINE_FIELDS} for row in rows]


def compare(
    name: str,
    state: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    expected_state: Mapping[str, str],
    expected_rows: Sequence[Mapping[str, Any]],
) -> list[str]:
    """One sentence for each difference between a victim and the twin."""
    found = [
        f"{name}: state {key!r} differs from the twin's"
        for key in sorted(state.keys() | expected_state.keys())
        if state.get(key) != expected_state.get(key)
    ]
    if len(rows) != len(expected_rows):
        found.append(f"{name}: {len(rows)} metrics rows, the twin has {len(expected_rows)}")
    found += [
        f"{name}: metrics row of step {row['step']} differs: {dict(row)} is not {dict(expected)}"
        for row, expected in zip(rows, expected_rows, strict=False)
        if row != expected
    ]
    return found
