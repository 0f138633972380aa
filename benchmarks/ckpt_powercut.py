"""Power cuts on ext4, replayed from a block log, for matilda-ckpt and its peers in one table.

    sudo python benchmarks/ckpt_powercut.py [--quick] [--images 1000] [--peer-dir DIR] [--json FILE]

Needs root, FUSE and loop devices, and says so where it cannot run. Each writer saves 12 steps of
three 100 kB tensors and keeps the newest two; every image is a state that a disk which honours
flushes may hold after a power cut. "Acknowledged" means that the writer's save had returned.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch
from ckpt_peers import Peer, available

from matilda_ckpt.torture import powercut


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.full((25_000,), step * 10 + i, dtype=torch.float32) for i in range(3)}


class Judged:
    """A peer as the power-cut harness sees it."""

    def __init__(self, kind: type[Peer]) -> None:
        self._kind = kind
        self._peer = kind()

    def save(self, folder: Path, step: int) -> None:
        self._peer.save(folder, step, tensors(step))
        if step > 2:
            self._peer.remove(folder, step - 2)
        # A writer that holds files open would keep the disk from being unmounted.
        self._peer.close()
        self._peer = self._kind()

    def judge(self, folder: Path, acknowledged: int) -> tuple[bool, bool, str]:
        torn = ""
        for step in self._peer.steps(folder) if folder.is_dir() else []:
            try:
                loaded = self._peer.load(folder, step)
            except Exception as error:  # any refusal is honest: an older one is tried
                torn = torn or f"step {step} is visible and does not load: {error!s:.80}"
                continue
            expected = {"step": torch.tensor(step), **tensors(step)}
            if loaded.keys() != expected.keys() or not all(
                torch.equal(loaded[key], value) for key, value in expected.items()
            ):
                return False, False, f"step {step} loads with other values than were saved"
            return step >= acknowledged, not torn, torn or f"{step} of {acknowledged}"
        return acknowledged == 0, not torn, torn or "no checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few images of each writer")
    parser.add_argument("--images", type=int, default=1000, help="per writer (default 1000)")
    parser.add_argument("--only", nargs="*", help="names of writers")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--peer-dir", type=Path, help="directory with importable peers")
    options = parser.parse_args()
    reason = powercut.why_not()
    if reason:
        print(f"POWER-CUT REPLAY NOT RUN: {reason}")
        return
    warnings.simplefilter("ignore")
    kinds, missing = available(options.peer_dir)
    rows = []
    print(f"{'writer':30} {'images':>7} {'lost ack':>9} {'torn':>6} {'seconds':>8}")
    for kind in kinds:
        if options.only and kind.name not in options.only:
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            verdict = powercut.run(
                Path(work),
                kind.name,
                lambda kind=kind: Judged(kind),
                images=12 if options.quick else options.images,
                saves=4 if options.quick else 12,
                pause_s=0.6,
            )
        seconds = time.monotonic() - begun
        print(
            f"{kind.name:30} {verdict.images:7} {verdict.lost:9} {verdict.torn:6} {seconds:8.1f}",
            flush=True,
        )
        rows.append(
            {
                "writer": kind.name,
                "images": verdict.images,
                "acknowledged_lost": verdict.lost,
                "torn": verdict.torn,
                "example": verdict.violations[:1],
            }
        )
    for line in missing:
        print(line)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "missing": missing}, indent=2) + "\n")


if __name__ == "__main__":
    main()
