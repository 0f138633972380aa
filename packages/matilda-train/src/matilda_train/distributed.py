"""Which process of how many this is, and the few things that processes tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process's place in a torchrun launch; one process alone is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store: Store | None = None
    """Where ranks can leave word for each other without a collective; None for one process."""

    @classmethod
    @contextmanager
    def join(cls, device: torch.device) -> Iterator[Ranks]:
        """Join the process group that torchrun's environment describes, and leave it at the end."""
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        store, _, _ = next(rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # What an attempt before a restart left in torchrun's store would mislead this one.
            store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        ranks = cls(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            store=store,
        )
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(ranks.local_rank)
        dist.init_process_group(
            # gloo beside NCCL: votes travel between the hosts without waiting for the GPUs
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device_id=torch.device("cuda", ranks.local_rank) if on_gpu else None,
        )
        try:
            yield ranks
        finally:
            dist.destroy_process_group()

    def own_device(self, device: torch.device) -> torch.device:
        """This process's device: one GPU a process, unless the config names a GPU.

        It becomes torch's current device, on whose stream events are recorded and kernels run.
        """
        if device.type != "cuda":
            return device
        if device.index is None:
            device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to people."""
        return self.rank == 0

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model` with gradients averaged over all ranks; a sharded model does so by itself."""
        if self.world_size == 1 or isinstance(model, FSDPModule):
            return model
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    @contextmanager
    def accumulate(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Exchange gradients, and let go of gathered weights, in the last micro-step only."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)
        wait = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if wait else nullcontext():  # type: ignore[operator]
            yield

    def mean_(self, value: Tensor) -> Tensor:
        """Average a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set; the same answer on every rank. The GPU is not asked."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(float(flag))
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers, on every rank. The GPU is not asked."""
        if self.world_size == 1:
            return number
        votes = torch.tensor(number)
        dist.all_reduce(votes, op=dist.ReduceOp.MIN)
        return int(votes.item())

    def of_main(self, text: str) -> str:
        """The main process's text, on every rank."""
        if self.world_size == 1:
            return text
        told = [text]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def require_same(self, **values: Any) -> None:
        """Raise `ValueError`, on every rank, for a name whose values the ranks do not share.

        Ranks that went on from other states would train a mixture of them.
        """
        if self.world_size == 1:
            return
        told: list[Any] = [None] * self.world_size
        dist.all_gather_object(told, values)
        for rank, theirs in enumerate(told):
            for name, value in theirs.items():
                if value != told[0].get(name):
                    raise ValueError(
                        f"`{name}` is {value!r} on rank {rank}, but {told[0].get(name)!r} on rank "
                        "0; give every rank the same config, data and run directory (on a file "
                        "system that all of them share)."
                    )

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on the main process, then on all others."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()
