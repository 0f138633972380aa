"""`decay`: from a checkpoint of a run's stable phase to a finished model, in a run of its own.

A WSD run can be annealed at any point of its stable phase. The new run begins with a copy of that
checkpoint, goes on with the same stream at the same place, and decays to its end; in every bit it
is the run that had its decay there from the start. Its directory appears whole or not at all: from
then on it is a run like any other, killed and resumed like any other.
"""

from __future__ import annotations

import json
import os
import shutil
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matilda_ckpt import Checkpointer, CheckpointInfo, verify
from matilda_train.config import RunConfig
from matilda_train.config_load import (
    apply_override,
    config_differences,
    config_from_dict,
    config_to_dict,
)
from matilda_train.duration import Duration
from matilda_train.hardware import choose_device
from matilda_train.metrics_log import EventLog
from matilda_train.provenance import collect_provenance
from matilda_train.rollback import is_restorable, read_rollbacks
from matilda_train.run_comparison import untimed_rows
from matilda_train.run_dir import RunDir
from matilda_train.trace import open_run_stream

__all__ = ["DecayRun", "decay_config", "decay_dir", "open_decay"]


@dataclass(frozen=True)
class DecayRun:
    """A run that anneals another one's checkpoint, ready for `train`."""

    run_dir: Path
    config: RunConfig
    is_new: bool
    """False: the directory was there, and the run goes on."""


def open_decay(
    parent: str | Path,
    *,
    from_step: int,
    tokens: int,
    run_dir: str | Path | None = None,
    data_dir: str | Path | None = None,
    shape: str | None = None,
    final_lr_fraction: float | None = None,
    overrides: Sequence[str] = (),
) -> DecayRun:
    """Make the run that anneals checkpoint `from_step` of `parent` over `tokens`, or find it.

    In `run_dir`, by default `PARENT-decay-STEP-TOKENS` beside the parent, which is only read.
    `shape` and `final_lr_fraction` are those of the parent's config unless given; `overrides`
    (`section.field=value`) may set what a resume may. `run.json` records the lineage under
    `parent`: run id, step, checkpoint and the hash of its manifest. The data in `data_dir`, if
    given, are looked at before anything is made.

    Raises `ValueError` when the parent has no stable phase, its checkpoint of that step is missing,
    damaged, still warming up or decaying already, the data are missing or others, an override is of
    the recipe, or `run_dir` holds something else; `OSError` when the disk fails.
    """
    parent = Path(parent)
    described = RunDir.read(parent)
    target = Path(run_dir or decay_dir(parent, from_step=from_step, tokens=tokens))
    config = decay_config(
        RunDir.config(parent),
        from_step=from_step,
        tokens=tokens,
        shape=shape,
        final_lr_fraction=final_lr_fraction,
    )
    raw = config_to_dict(config)
    for override in overrides:
        apply_override(raw, override)
    chosen = config_from_dict(raw)
    recipe = config_differences(config_to_dict(config), chosen)[0]
    if recipe:
        changes = "; ".join(f"`{name}`: {change}" for name, change in recipe.items())
        raise ValueError(f"`--set` may change what a resume may, not the recipe ({changes}).")
    if data_dir is not None:
        open_run_stream(parent, chosen, data_dir, ())  # are the data there, and the parent's?
    is_new = not (target / "run.json").is_file()
    if is_new:
        checkpoint = _find_checkpoint(parent, from_step)
        lineage = {
            "run_id": described["run_id"],
            "run_dir": _with_a_name(parent).name,
            "step": from_step,
            "checkpoint": checkpoint.name,
            "manifest_sha256": checkpoint.manifest_sha256,
        }
        _publish(target, config, parent, described["data_id"], lineage)
    found = RunDir.read(target).get("parent", {})
    if (found.get("run_id"), found.get("step")) != (described["run_id"], from_step):
        raise ValueError(
            f"{str(target)!r} holds another run than the decay of {str(parent)!r} from step "
            f"{from_step}; choose another `--run-dir`."
        )
    return DecayRun(target, chosen, is_new)


def decay_dir(parent: Path, *, from_step: int, tokens: int) -> Path:
    """Where the decay of `parent` lies unless its directory is named: beside it."""
    parent = _with_a_name(parent)
    return parent.with_name(f"{parent.name}-decay-{from_step}-{tokens}")


def _with_a_name(path: Path) -> Path:
    """`path`, or what it stands for: nothing can be named beside `.` or `..`."""
    return path.resolve() if path.name in ("", "..") else path


def decay_config(
    config: RunConfig,
    *,
    from_step: int,
    tokens: int,
    shape: str | None = None,
    final_lr_fraction: float | None = None,
) -> RunConfig:
    """`config` with its decay over `tokens` (rounded up to whole steps) from `from_step` on.

    Raises `ValueError` when `from_step` is not in the stable phase of `config`.
    """
    plan, optim, total = config.plan, config.optim, config.train.total_steps
    if optim.schedule == "cosine":
        raise ValueError(
            "The run has no stable phase, for `optim.schedule` is 'cosine'; only runs of 'wsd' or "
            "'constant' can be annealed from a checkpoint."
        )
    if optim.weight_decay_schedule in ("linear", "cosine"):
        raise ValueError(
            "The run's weight decay follows its whole length (`optim.weight_decay_schedule` is "
            f"{optim.weight_decay_schedule!r}), so a shorter run would have had another one before "
            "this checkpoint; only runs with 'constant' or 'lr' can be annealed from one."
        )
    if tokens < 1:
        raise ValueError(f"`--tokens` is {tokens}, but must be 1 or more.")
    if from_step < max(1, optim.warmup_steps):
        raise ValueError(
            f"At step {from_step} the learning rate still warms up (`optim.warmup_steps` is "
            f"{optim.warmup_steps}); choose a later checkpoint."
        )
    if optim.schedule == "wsd" and _is_decaying(config, from_step):
        first = bisect_left(range(from_step), True, key=lambda step: _is_decaying(config, step))
        raise ValueError(
            f"At step {from_step} of {total} the run decays already; choose a checkpoint from "
            f"step {first - 1} or before."
        )
    before = plan.tokens(from_step)
    new_total = plan.step_at(Duration(before + tokens, "tokens"))
    decay_steps = new_total - from_step
    if optim.schedule_by == "tokens":
        fraction = (plan.tokens(new_total) - before) / plan.tokens(new_total)
    else:
        fraction = decay_steps / new_total
    raw = config_to_dict(config)
    raw["train"]["total_steps"] = new_total
    raw["optim"] |= {
        "schedule": "wsd",
        "decay_fraction": fraction,
        "momentum_cooldown_steps": min(optim.momentum_cooldown_steps, decay_steps),
        "decay_shape": optim.decay_shape if shape is None else shape,
        "final_lr_fraction": optim.final_lr_fraction
        if final_lr_fraction is None
        else final_lr_fraction,
    }
    return config_from_dict(raw)


def _is_decaying(config: RunConfig, step: int) -> bool:
    """Whether a WSD run has taken a step of its decay before `step`."""
    done, total = step, config.train.total_steps
    if config.optim.schedule_by == "tokens":
        done, total = config.plan.tokens(step), config.plan.tokens(total)
    return done > total - round(config.optim.decay_fraction * total)


def _find_checkpoint(parent: Path, step: int) -> CheckpointInfo:
    """The parent's newest intact, healthy checkpoint of `step`."""
    found = Checkpointer(parent / "checkpoints", read_only=True).list()
    usable = [info for info in found if info.problem is None and info.healthy]
    for info in usable:
        if info.step == step:
            return info
    have = ", ".join(f"{info.step:,}" for info in reversed(usable)) or "none"
    raise ValueError(
        f"{str(parent)!r} has no healthy checkpoint of step {step}; it has: {have}. "
        "`ckpt.keep_every` keeps some for good."
    )


def _publish(
    target: Path, config: RunConfig, parent: Path, data_id: str, lineage: Mapping[str, Any]
) -> None:
    """Write the new run's directory beside `target`, and give it that name when it is whole."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"{str(target)!r} exists and holds no run (no `run.json`); choose an empty or new "
            "`--run-dir`."
        )
    _remove_partial(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")

    def provenance() -> dict[str, Any]:
        collected = collect_provenance(choose_device(config.train.device))
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        return collected | {"world_size": world_size, "parent": dict(lineage)}

    try:
        RunDir.open(partial, config, data_id=data_id, provenance=provenance).close()
        copy = partial / "checkpoints" / lineage["checkpoint"]
        shutil.copytree(parent / "checkpoints" / copy.name, copy, copy_function=_copy_durably)
        report = verify(copy)
        if not report.ok:
            raise ValueError(
                f"The checkpoint of step {lineage['step']} cannot be used: {report.problem}; "
                "choose another one."
            )
        # The parent's rows belong to the curve; the time that they took is the parent's.
        rows = [row for row in untimed_rows(parent) if row["step"] <= lineage["step"]]
        with (partial / "metrics.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        events = EventLog(partial / "events.jsonl")
        events.write("decay", parent=dict(lineage))
        # The samples that the parent left out stay left out.
        saved = Checkpointer(copy.parent, read_only=True).list()[0]
        for rollback in read_rollbacks(parent):
            if is_restorable(saved, [rollback]):
                events.write("rollback", **asdict(rollback))
        for folder in (copy, copy.parent, partial):
            _sync_folder(folder)
        partial.rename(target)
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _remove_partial(target: Path) -> None:
    """What a killed attempt has left; that of a living process is left alone."""
    for left in target.parent.glob(f".{target.name}.partial-*"):
        try:
            os.kill(int(left.name.rpartition("-")[2]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, PermissionError):
            continue


def _copy_durably(source: str, destination: str) -> str:
    shutil.copyfile(source, destination)
    with Path(destination).open("rb+") as file:
        os.fsync(file.fileno())
    return destination


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
