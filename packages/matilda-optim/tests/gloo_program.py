"""Runs the same seeded steps alone, under DDP sharing and under FSDP2, and compares the bits.

Started by `test_optim_distributed.py`; forks its ranks after one import of torch.
Usage: python gloo_program.py CASE…; prints one line per case.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from matilda_optim import Muon

STEPS = 3
SHAPES = [(1, 24), (3, 32), (17, 40), (64, 32), (32, 64), (32, 32), (40, 17), (33, 33)]


class Weights(nn.Module):
    """Plain matrices, an odd vector and a matrix for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for i, shape in enumerate(SHAPES):
            setattr(self, f"w{i}", nn.Parameter(torch.randn(shape, generator=g)))
        self.vector = nn.Parameter(torch.randn(7, generator=g))
        self.table = nn.Parameter(torch.randn(10, 6, generator=g))


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The elements as stored; without numpy, which this package does not need."""
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def optimizer_of(model: nn.Module, **options: Any) -> Muon:
    named = dict(model.named_parameters())
    matrices = [(n, p) for n, p in named.items() if n.startswith("w")]
    rest = [(n, p) for n, p in named.items() if not n.startswith("w")]
    groups = [
        {"params": matrices, "name": "hidden"},
        {"params": rest, "name": "rest", "algorithm": "adamw"},
    ]
    return Muon(groups, lr=0.02, ns_coefficients="polar_express", **options)


def train(model: nn.Module, optimizer: Muon, first: int, last: int) -> None:
    for step in range(first, last):
        g = torch.Generator().manual_seed(100 + step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=g)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            else:
                p.grad = grad
        optimizer.step()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def digest(model: nn.Module, optimizer: Muon) -> str:
    sha = hashlib.sha256()
    for name, p in model.named_parameters():
        sha.update(name.encode() + raw_bytes(whole(p.detach())))
        for key in sorted(optimizer.state[p]):
            sha.update(raw_bytes(whole(optimizer.state[p][key])))
    return sha.hexdigest()


def alone(folder: Path) -> str:
    model = Weights()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, STEPS)
    return digest(model, optimizer)


def ddp(folder: Path, distribute: str = "ddp") -> str:
    model = Weights()
    optimizer = optimizer_of(model, distribute=distribute)
    train(model, optimizer, 0, STEPS)
    return digest(model, optimizer)


def auto(folder: Path) -> str:
    return ddp(folder, "auto")


def fsdp(folder: Path) -> str:
    model = Weights()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, STEPS)
    return digest(model, optimizer)


def hsdp(folder: Path) -> str:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))
    model = Weights()
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, STEPS)
    return digest(model, optimizer)


def columns_and_two_dimensions(folder: Path) -> str:
    """Shard(1), and a layout over two mesh dimensions that takes the general way."""
    half = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, half), mesh_dim_names=("a", "b"))
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
    """Two steps under FSDP2, then a distributed checkpoint."""
    model = Weights()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, STEPS - 1)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "dcp")
    return "saved"


def load(folder: Path) -> str:
    """Loads it on this number of ranks and takes the last step."""
    model = Weights()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
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
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
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
    "short": [(ddp, 2), (fsdp, 2), (save, 2), (load, 1)],
    "ddp": [(ddp, 2), (ddp, 3), (ddp, 4), (auto, 2)],
    "fsdp": [(fsdp, 2), (fsdp, 4), (hsdp, 4), (columns_and_two_dimensions, 4)],
    "reshard": [(save, 4), (load, 4), (load, 2), (load, 1)],
}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = run(alone, 1, folder)
        for which in sys.argv[1:]:
            for case, world in CASES[which]:
                got = run(case, world, folder)
                verdict = "equal" if got in (expected, {"saved"}) else "DIFFERENT"
                print(f"{which} {case.__name__} {world} {verdict}", flush=True)


if __name__ == "__main__":
    main()
