"""Data parallel: the ranks share out the orthogonalisation and gather the updates.

Gradients, momenta and parameters are the same on every rank, so each rank orthogonalises a fixed
part of every class and receives the rest. A matrix's result does not depend on its batch, so the
parameters are the same bits for any number of ranks, and with or without sharing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NewtonSchulz = Callable[..., Tensor]
DISTRIBUTE = ("none", "ddp", "auto")


class Sharing:
    """Decides whether a class is shared out, and does it.

    "ddp" always shares. "auto" times both ways once per class, on the first step outside graph
    capture; the group's first rank decides for all.
    """

    def __init__(self, mode: str, group: Any = None) -> None:
        if mode not in DISTRIBUTE:
            raise ValueError(
                f"`distribute` must be one of {', '.join(map(repr, DISTRIBUTE))}, got {mode!r}"
            )
        if mode != "none" and not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"`distribute` {mode!r} needs torch.distributed; call "
                '`init_process_group` first or use "none"'
            )
        self.mode = mode
        self.group = group
        self.decisions: dict[tuple[int, ...], bool] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharing:
        """Another of the same ranks: a process group is a connection, which cannot be copied."""
        copied = Sharing(self.mode, self.group)
        copied.decisions.update(self.decisions)
        return copied

    def __call__(self, newton_schulz: NewtonSchulz, x_BMN: Tensor, *others: Tensor) -> Tensor:
        """`newton_schulz(x_BMN, *others)`, computed once over all ranks.

        The first dimension of all tensors is the batch.
        """
        if self.mode == "none" or dist.get_world_size(self.group) == 1:
            return newton_schulz(x_BMN, *others)
        key = tuple(x_BMN.shape)
        shared = True if self.mode == "ddp" else self.decisions.get(key)
        if shared is None:
            shared = self.decisions[key] = self._measure(newton_schulz, x_BMN, *others)
        if not shared:
            return newton_schulz(x_BMN, *others)
        return self._shared(newton_schulz, x_BMN, *others)

    def _shared(self, newton_schulz: NewtonSchulz, x_BMN: Tensor, *others: Tensor) -> Tensor:
        world, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        batch = x_BMN.shape[0]
        per_rank = -(-batch // world)
        mine, *rest = [t[rank * per_rank : (rank + 1) * per_rank] for t in (x_BMN, *others)]
        out = mine.new_zeros(per_rank, *x_BMN.shape[1:])
        if mine.shape[0]:
            out[: mine.shape[0]] = newton_schulz(mine, *rest)
        gathered = x_BMN.new_empty(world * per_rank, *x_BMN.shape[1:])
        dist.all_gather_into_tensor(gathered, out, group=self.group)
        return gathered[:batch]

    def _measure(self, newton_schulz: NewtonSchulz, x_BMN: Tensor, *others: Tensor) -> bool:
        """Times both ways after a warm-up each; the first rank's verdict is broadcast."""
        seconds = []

        def shared() -> Tensor:
            return self._shared(newton_schulz, x_BMN, *others)

        def alone() -> Tensor:
            return newton_schulz(x_BMN, *others)

        for way in (alone, shared):
            way()
            _synchronize(x_BMN.device)
            dist.barrier(group=self.group)
            begin = time.perf_counter()
            way()
            _synchronize(x_BMN.device)
            seconds.append(time.perf_counter() - begin)
        verdict = torch.tensor([float(seconds[1] < seconds[0])], device=x_BMN.device)
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast(verdict, src=first, group=self.group)
        return bool(verdict.item())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
