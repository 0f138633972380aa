"""A real (tiny) training, killed with SIGKILL at random moments and started again, many times.

`python -m matilda_ckpt.torture.soak DIR --kills 500 [--background]` prints a verdict as JSON. The
final weights, optimizer state and random generators must equal, bit for bit, those of a twin that
was never interrupted. Each life is a fork of this process, so that torch is imported once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from matilda_ckpt.checkpointer import Checkpointer
from matilda_ckpt.retention import Keep
from matilda_ckpt.rng import RngState

STEPS_AFTER = 6
"""Steps of the last life, which nobody kills."""


class Loop:
    """Position of the training."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step = state["step"]


def everything() -> dict[str, object]:
    """A freshly initialised training: model with dropout, AdamW, generators, position."""
    torch.manual_seed(1234)
    random.seed(1234)
    np.random.seed(1234)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 96), torch.nn.Dropout(0.2), torch.nn.GELU(), torch.nn.Linear(96, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    return {"model": model, "optimizer": optimizer, "loop": Loop(), "rng": RngState()}


def advance(parts: dict[str, object], ready: Callable[[], None] = lambda: None) -> None:
    """One optimizer step whose data and dropout come from the global generators; `ready` is
    called before anything that was saved changes."""
    model, optimizer, loop = parts["model"], parts["optimizer"], parts["loop"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(loop, Loop)
    x = torch.randn(8, 16) * (1 + random.random())
    loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
    loss.backward()
    ready()
    optimizer.step()
    optimizer.zero_grad()
    loop.step += 1


def digest(value: object) -> str:
    """SHA-256 over every tensor's bytes and every other value's repr, in order."""
    h = hashlib.sha256()

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            h.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                h.update(repr(key).encode())
                visit(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        else:
            h.update(repr(value).encode())

    visit(value)
    return h.hexdigest()


def digest_now(parts: dict[str, object]) -> str:
    return digest({name: part.state_dict() for name, part in parts.items()})  # type: ignore[attr-defined]


def live(root: Path, steps: int, background: bool) -> None:
    """One life: resume, train, save after every step."""
    parts = everything()
    loop = parts["loop"]
    assert isinstance(loop, Loop)
    with Checkpointer(root, keep=Keep(last=2), threads=2) as checkpoints:
        checkpoints.restore(parts)
        while loop.step < steps:
            advance(parts, checkpoints.wait_copied)
            checkpoints.save(loop.step, parts, wait=not background, defer_copy=background)


def soak(root: Path, kills: int, background: bool, seed: int = 0) -> dict[str, object]:
    """Verdict of `kills` kills; raises nothing, so that it can be printed.

    How far the training comes in between depends on the machine; the twin goes as far.
    """
    torch.set_num_threads(1)
    span = _life_s(root, background)
    rng = random.Random(seed)
    begun = time.monotonic()
    killed = lives = 0
    while killed < kills:
        lives += 1
        child = _fork(root, 10**9, background)
        time.sleep(rng.uniform(0.0, 2 * span))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return {"ok": False, "kills": killed, "problem": f"life {lives} failed to resume"}
        killed += 1
    found = Checkpointer(root, read_only=True).list()
    steps = (found[0].step if found else 0) + STEPS_AFTER
    lives += 1
    _, status = os.waitpid(_fork(root, steps, background), 0)
    if status:
        return {"ok": False, "kills": killed, "problem": "the last life failed to resume"}
    twin = everything()
    for _ in range(steps):
        advance(twin)
    expected = digest_now(twin)
    parts = everything()
    with Checkpointer(root) as checkpoints:
        restored = checkpoints.restore(parts)
    sha256 = digest_now(parts)
    return {
        "ok": sha256 == expected and restored is not None and not restored.skipped,
        "kills": killed,
        "lives": lives,
        "steps": steps,
        "seconds": round(time.monotonic() - begun, 1),
        "background": background,
        "sha256": sha256,
        "expected": expected,
    }


def _life_s(root: Path, background: bool) -> float:
    """Seconds of a life of three steps on this machine; kills come at up to twice that.

    Also loads here, once, what every life would otherwise import for itself.
    """
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        live(Path(scratch) / "a", 1, background)
        begun = time.monotonic()
        os.waitpid(_fork(Path(scratch) / "b", 3, background), 0)
        return time.monotonic() - begun


def _fork(root: Path, steps: int, background: bool) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            live(root, steps, background)
            status = 0
        finally:
            os._exit(status)
    return child


def main() -> int:
    parser = argparse.ArgumentParser(description="kill a tiny training many times")
    parser.add_argument("root", type=Path)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--background", action="store_true", help="wait=False, defer_copy=True")
    options = parser.parse_args()
    verdict = soak(options.root, options.kills, options.background)
    sys.stdout.write(json.dumps(verdict) + "\n")
    return 0 if verdict["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
