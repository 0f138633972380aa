"""Replaying a step: the loop itself, from the nearest checkpoint to that step, beside the run.

A scratch run directory is given the run's description, its rollbacks up to then and links to one
checkpoint; `train` resumes there, with a row for each step, until the step's row is written. What
is compared is therefore what the loop does, not a copy of it. The run is only read.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matilda_ckpt import Checkpointer, CheckpointInfo
from matilda_train.config import RunConfig
from matilda_train.console import Display, SilentDisplay
from matilda_train.loop import train
from matilda_train.metrics_log import EventLog, read_rows
from matilda_train.rollback import is_restorable, read_rollbacks
from matilda_train.run_dir import RunDir
from matilda_train.trace import open_run_stream

__all__ = ["Replay", "read_bundle", "replay_step"]

COMPARED = ("loss_nats", "grad_norm", "batch_sha256")


@dataclass(frozen=True)
class Replay:
    """What a step was when it was run again."""

    step: int
    from_step: int
    """Step of the checkpoint that it was replayed from."""
    row: dict[str, Any]
    """The step's metrics row of the replay."""
    expected: dict[str, Any] | None
    """Loss, gradient norm and hash of all batches as the run wrote them; None if it did not."""

    @property
    def differences(self) -> list[str]:
        """One line for each figure that is not the same number, to the last bit."""
        if self.expected is None:
            return []
        return [
            f"{name}: {self.expected[name]!r} in the run, {self.row[name]!r} replayed"
            + _gap(self.expected[name], self.row[name])
            for name in COMPARED
            if name in self.expected and self.expected[name] != self.row[name]
        ]


def read_bundle(bundle: str | Path) -> dict[str, Any]:
    """The report of an autopsy bundle; `ValueError` when `bundle` is none."""
    file = Path(bundle) / "autopsy.json"
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = report["step"], report["rollbacks"], *(report[name] for name in COMPARED)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(bundle)!r} is no autopsy bundle ({error}); give a directory below a run's "
            "`autopsies`, or `--run` and `--step`."
        ) from None
    return report


def replay_step(
    run_dir: str | Path,
    step: int,
    *,
    report: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    device: str | None = None,
    scratch: str | Path | None = None,
    display: Display | None = None,
) -> Replay:
    """Run `step`, counted from 1, of a run again, from its nearest healthy checkpoint before it.

    Compared with the autopsy's `report` if given (then the run is replayed as it was before a
    later rollback), else with the run's metrics row. The same bits on a CPU, and on a GPU with
    `train.deterministic`. `device` replaces the run's; `scratch` keeps the replay's run directory.
    Raises `ValueError` for a step that the run has not or other data, `CheckpointError` when no
    checkpoint before it is left.
    """
    run_dir = Path(run_dir)
    config = RunDir.config(run_dir)
    if not 1 <= step <= config.train.total_steps:
        raise ValueError(
            f"Step {step} is not part of this run; give one from 1 to {config.train.total_steps}."
        )
    open_run_stream(run_dir, config, data_dir, ())  # are the data there, and the run's own?
    rollbacks = read_rollbacks(run_dir)
    behind = len(rollbacks) if report is None else int(report["rollbacks"])
    undone_by = rollbacks[behind] if behind < len(rollbacks) else None
    source = Checkpointer(run_dir / "checkpoints", read_only=True)
    usable = [
        saved
        for saved in source.list()
        if saved.healthy
        and saved.problem is None
        and saved.step < step
        and is_restorable(saved, rollbacks[:behind], undone_by)
    ]
    nearest = max(usable, key=lambda saved: saved.step, default=None)
    with ExitStack() as cleanup:
        if scratch is None:
            scratch = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="matilda-replay-"))
        scratch = Path(scratch)
        if scratch.exists() and any(scratch.iterdir()):
            raise ValueError(f"{str(scratch)!r} is not empty; give `--into` a new directory.")
        _furnish(scratch, run_dir, nearest, behind)
        until = _Until(step, display or SilentDisplay())
        with suppress(_ReachedError):
            train(
                _quietly(config, data_dir, device),
                run_dir=scratch,
                data_dir=data_dir,
                display=until,
            )
        rows = {r["step"]: r for r in read_rows(scratch / "metrics.jsonl") if "loss_nats" in r}
        return Replay(
            step=step,
            from_step=nearest.step if nearest is not None else 0,
            row=rows[step],
            expected=_expected(run_dir, step, report),
        )


def _furnish(scratch: Path, run_dir: Path, nearest: CheckpointInfo | None, behind: int) -> None:
    """Make `scratch` the run as it was at the checkpoint; without one, at its beginning."""
    scratch.mkdir(parents=True, exist_ok=True)
    shutil.copy2(run_dir / "run.json", scratch / "run.json")
    events = EventLog(scratch / "events.jsonl")
    for event in read_rows(run_dir / "events.jsonl"):
        if event.get("event") == "rollback" and behind > 0:
            behind -= 1
            events.write(
                "rollback", **{k: v for k, v in event.items() if k not in ("event", "time")}
            )
    if nearest is not None:
        target = scratch / "checkpoints" / nearest.name
        shutil.copytree(nearest.path, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _quietly(config: RunConfig, data_dir: str | Path | None, device: str | None) -> RunConfig:
    """The same recipe, with a row for each step and nothing that is not a step."""
    never = config.train.total_steps + 1
    policy = "skip" if config.train.spike_policy == "rollback" else config.train.spike_policy
    return replace(
        config,
        data=replace(config.data, dir=str(data_dir) if data_dir else config.data.dir, corpus=None),
        train=replace(
            config.train,
            device=device or config.train.device,
            spike_policy=policy,
            max_consecutive_skips=never,
        ),
        eval=replace(
            config.eval, every=None, every_steps=never, tokens=1, tasks=(), sample_tokens=0
        ),
        ckpt=replace(config.ckpt, every=None, every_steps=never),
        log=replace(config.log, every=None, every_steps=1, wandb=False, autopsies=0),
    )


def _expected(run_dir: Path, step: int, report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if report is not None:
        return {name: report[name] for name in COMPARED}
    rows = read_rows(run_dir / "metrics.jsonl")
    found = [row for row in rows if row.get("step") == step and "loss_nats" in row]
    return {name: found[-1][name] for name in COMPARED} if found else None


def _gap(one: Any, other: Any) -> str:
    numbers = isinstance(one, float) and isinstance(other, float)
    if not numbers or not math.isfinite(one) or one == 0:
        return ""
    return f" (relative difference {abs(one - other) / abs(one):.1e})"


class _ReachedError(Exception):
    """The wanted step's row has been written."""


class _Until:
    """A display that ends the run at a step."""

    def __init__(self, step: int, display: Display) -> None:
        self._step = step
        self._display = display

    def begin(self, what: str, *, total: int, done: int = 0) -> None:
        self._display.begin("replaying", total=self._step, done=done)

    def advance(self, done: int, detail: str) -> None:
        self._display.advance(done, detail)
        if done >= self._step:
            raise _ReachedError

    def note(self, text: str) -> None:
        """What the loop remarks on is the replay's own doing."""
