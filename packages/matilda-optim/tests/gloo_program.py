"""Runs the same seeded steps alone, under DDP sharing and under FSDP2, and compares the bits.

Started by `test_optim_distributed.py`; forks its ranks after one import of torch.
Usage: python gloo_program.py CASE…; prints the digest of one rank and a line per case.
With MATILDA_DEVICE=cuda every rank has a GPU and NCCL takes gloo's place.
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import seeded_steps
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from seeded_steps import DEVICE, STEPS, Weights, digest, optimizer_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from matilda_optim import Muon


def in_layout(grad: Tensor, p: Tensor) -> Tensor:
    if isinstance(p, DTensor):
        return distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
    return grad


def train(model: nn.Module, optimizer: Muon, first: int, last: int) -> None:
    seeded_steps.train(model, optimizer, first, last, in_layout)


def alone(folder: Path) -> str:
    return seeded_steps.alone()


def ddp(folder: Path, distribute: str = "ddp") -> str:
    model = Weights()
    optimizer = optimizer_of(model, distribute=distribute)
    train(model, optimizer, 0, STEPS)
    return digest(model, optimizer)


def copied(folder: Path) -> str:
    """A copy goes on where its original was, with the same ranks."""
    model = Weights()
    optimizer = optimizer_of(model, distribute="ddp", process_group=dist.new_group())
    train(model, optimizer, 0, 2)
    model, optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, STEPS)
    return digest(model, optimizer)


def auto(folder: Path) -> str:
    return ddp(folder, "auto")


def fsdp(folder: Path) -> str:
    model = Weights()
    fully_shard(model, mesh=init_device_mesh(DEVICE, (dist.get_world_size(),)))
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, STEPS)
    return digest(model, optimizer)


def skip(folder: Path) -> str:
    """A NaN in one shard leaves its whole matrix alone, or AdamW's whole group, on every rank."""
    model = Weights()
    fully_shard(model, mesh=init_device_mesh(DEVICE, (dist.get_world_size(),)))
    optimizer = optimizer_of(model, nonfinite="skip")
    train(model, optimizer, 0, STEPS)
    before = digest(model, optimizer)
    w3: Any = model.w3
    start = w3.full_tensor().clone()
    others = model.w4.full_tensor().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if dist.get_rank() == 0:
        w3.grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    held = torch.equal(w3.full_tensor(), start) and not torch.equal(model.w4.full_tensor(), others)
    table, vector = model.table.full_tensor().clone(), model.vector.full_tensor().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if dist.get_rank() == dist.get_world_size() - 1:
        model.table.grad.to_local().fill_(float("inf"))
    optimizer.step()
    held &= torch.equal(model.table.full_tensor(), table)
    held &= torch.equal(model.vector.full_tensor(), vector)
    return before if held else "what should have been skipped moved"


def hsdp(folder: Path) -> str:
    mesh = init_device_mesh(DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))
    model = Weights()
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, STEPS)
    return digest(model, optimizer)


def columns_and_two_dimensions(folder: Path) -> str:
    """Shard(1), and a layout over two mesh dimensions that takes the general way."""
    half = dist.get_world_size() // 2
    mesh = init_device_mesh(DEVICE, (2, half), mesh_dim_names=("a", "b"))
    layouts = [(Replicate(), Shard(1)), (Shard(0), Shard(1)), (Replicate(), Replicate())]
    model = Weights()
    for i, (name, p) in enumerate(list(model.named_parameters())):
        layout = layouts[i % 3] if p.ndim == 2 else (Replicate(), Shard(0))
        sharded = distribute_tensor(p.detach(), mesh, layout, src_data_rank=None)
        setattr(model, name, nn.Parameter(sharded))
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, STEPS)
    return digest(model, optimizer)


def save(folder: Path) -> str:
    """Two steps under FSDP2, a distributed checkpoint, and the last step."""
    model = Weights()
    fully_shard(model, mesh=init_device_mesh(DEVICE, (dist.get_world_size(),)))
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, STEPS - 1)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "dcp")
    train(model, optimizer, STEPS - 1, STEPS)
    return digest(model, optimizer)


def load(folder: Path) -> str:
    """Loads it on this number of ranks and takes the last step."""
    model = Weights()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh(DEVICE, (dist.get_world_size(),)))
    optimizer = optimizer_of(model)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, STEPS - 1, STEPS)
    return digest(model, optimizer)


def _rank(case: Callable[[Path], str], rank: int, world: int, folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{name}"), world)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    (folder / f"{name}-{rank}").write_text(case(folder))
    dist.destroy_process_group()


def run(case: Callable[[Path], str], world: int, folder: Path) -> set[str]:
    """What each rank reports."""
    name = f"{case.__name__}-{world}"
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(case, rank, world, folder, name))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return {(folder / f"{name}-{rank}").read_text() for rank in range(world)}


CASES: dict[str, list[tuple[Callable[[Path], str], int]]] = {
    "short": [(ddp, 2), (copied, 2), (save, 2), (load, 1)],
    "ddp": [(ddp, 2), (ddp, 3), (ddp, 4), (auto, 2)],
    "fsdp": [(fsdp, 2), (fsdp, 4), (hsdp, 4), (columns_and_two_dimensions, 4)],
    "pair": [(ddp, 2), (auto, 2), (fsdp, 2), (skip, 2)],
    "pair-reshard": [(save, 2), (load, 2), (load, 1), (alone, 1)],
    "reshard": [(save, 4), (load, 4), (load, 2), (load, 1)],
}


def main() -> None:
    if DEVICE == "cpu":  # what a first optimizer imports is then imported once, not by every rank
        optimizer_of(Weights())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = run(alone, 1, folder)
        print(*expected, flush=True)
        for which in sys.argv[1:]:
            for case, world in CASES[which]:
                got = run(case, world, folder)
                verdict = "equal" if got == expected else "DIFFERENT"
                print(f"{which} {case.__name__} {world} {verdict}", flush=True)


if __name__ == "__main__":
    main()
