"""A run made small enough to try a config with, in seconds and on any machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from matilda_train.config import RunConfig
from matilda_train.distributed import Ranks

__all__ = ["passing_run_dir", "shorten"]

MOST_STEPS = 20
CPU_SEQ_LEN = 256


@contextmanager
def passing_run_dir(ranks: Ranks) -> Iterator[Path]:
    """One directory for all ranks, removed afterwards.

    Several machines may share nothing but where they were started, so there it lies then.
    """
    machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # torchrun's
    folder = Path.cwd() if machines > 1 else None
    if not ranks.is_main:
        yield Path(ranks.of_main(""))
        return
    with tempfile.TemporaryDirectory(prefix="matilda-dry-run-", dir=folder) as path:
        yield Path(ranks.of_main(path))


def shorten(config: RunConfig, device: torch.device, world_size: int) -> RunConfig:
    """The same run in at most 20 steps of two micro-steps; on a CPU, of one short sequence.

    Ramps of batch and sequence length and evaluation tasks are left out, and warm-ups end with the
    run at the latest.
    """
    on_cpu = device.type == "cpu"
    steps = min(config.train.total_steps, MOST_STEPS)
    seq_len = min(config.seq_len, CPU_SEQ_LEN) if on_cpu else config.seq_len
    micro_batch_size = 1 if on_cpu else config.micro_batch_size
    micro_step_tokens = seq_len * micro_batch_size * world_size
    most_tokens = micro_step_tokens * (1 if on_cpu else 2)
    warmup_steps = min(
        config.optim.warmup_steps, steps - round(config.optim.decay_fraction * steps)
    )
    return replace(
        config,
        optim=replace(
            config.optim,
            warmup_steps=warmup_steps,
            momentum_warmup_steps=min(config.optim.momentum_warmup_steps, steps // 2),
            momentum_cooldown_steps=min(config.optim.momentum_cooldown_steps, steps // 2),
        ),
        data=replace(config.data, mix=()),
        train=replace(
            config.train,
            spike_policy="warn",
            total_steps=steps,
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            tokens_per_step=min(config.train.tokens_per_step, most_tokens),
            batch_ramp=(),
            seq_len_ramp=(),
        ),
        eval=replace(config.eval, tokens=micro_step_tokens, tasks=()),
    )
