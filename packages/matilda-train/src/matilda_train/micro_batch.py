"""`train.micro_batch_size="auto"`: the largest micro-batch that fits; the global batch stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from matilda_train.config import RunConfig
from matilda_train.distributed import Ranks
from matilda_train.hardware import device_name
from matilda_train.run_dir import RunDir
from matilda_train.trial_step import StepTrial, TrialRun, largest_that_fits

__all__ = ["CPU_MICRO_BATCH", "settle_micro_batch", "sizes_that_divide"]

CPU_MICRO_BATCH = 8
"""What `auto` takes on a CPU, or the largest power of two below it that divides the batch: more
sequences at once are not faster there."""


def settle_micro_batch(
    config: RunConfig,
    device: torch.device,
    ranks: Ranks,
    *,
    run_dir: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> RunConfig:
    """`config` with a number for `train.micro_batch_size`; unchanged where it has one.

    A run that goes on in `run_dir` on the same kind of device keeps the number it began with, for
    it decides about rounding. Otherwise it is found by real steps, and is the same on all ranks.
    Raises `ValueError` when not even one sequence fits.
    """
    if config.train.micro_batch_size != "auto":
        return config
    sizes = sizes_that_divide(config, ranks.world_size)
    size = _size_before(run_dir, device, sizes)
    if size is None and device.type == "cpu":
        size = max(s for s in sizes if s <= CPU_MICRO_BATCH)
    if size is None:
        trials = TrialRun(config, device, ranks.world_size)
        try:
            best = largest_that_fits(trials, sizes, tried=lambda t: note(describe_trial(t)))
        finally:
            trials.close()
        size = best.micro_batch_size if best is not None else 0
    size = ranks.least(size)
    if size == 0:
        raise ValueError(
            f"Not even one sequence of {config.seq_len} tokens fits into this device's memory; "
            "lower `train.seq_len`, make the model smaller, or divide it over several devices "
            "with `train.parallel=fsdp` and a fixed `train.micro_batch_size`."
        )
    note(f"`train.micro_batch_size` is {size}")
    return replace(config, train=replace(config.train, micro_batch_size=size))


def sizes_that_divide(config: RunConfig, world_size: int) -> list[int]:
    """Powers of two that divide every global batch of the run on `world_size` devices, ascending.

    Raises `ValueError` when a batch does not even divide by the devices.
    """
    per_device = []
    for stage in config.plan.batch_stages:
        batch_size = stage.tokens_per_step // config.seq_len
        if batch_size % world_size != 0:
            raise ValueError(
                f"The global batch of {batch_size} sequences does not divide by {world_size} "
                "devices; change `train.tokens_per_step`."
            )
        per_device.append(batch_size // world_size)
    powers = (1 << n for n in range(min(per_device).bit_length()))
    return [p for p in powers if all(share % p == 0 for share in per_device)]


def describe_trial(trial: StepTrial) -> str:
    """A trial in one line."""
    size = f"micro-batch of {trial.micro_batch_size}"
    memory = "" if trial.peak_bytes is None else f", {trial.peak_bytes / 2**30:.1f} GiB at most"
    if not trial.fits:
        return f"{size}: does not fit{memory}"
    assert trial.micro_step_seconds is not None
    return f"{size}: fits{memory}, {1e3 * trial.micro_step_seconds:.0f} ms a micro-step"


def _size_before(run_dir: Path | None, device: torch.device, sizes: list[int]) -> int | None:
    if run_dir is None or not (run_dir / "run.json").is_file():
        return None
    run = RunDir.read(run_dir)
    size = run["config"]["train"]["micro_batch_size"]
    return size if run.get("device") == device_name(device) and size in sizes else None
