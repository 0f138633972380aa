"""Seeded steps of a small model and the digest of what they leave; for several test programs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from matilda_optim import Muon

STEPS = 3
DEVICE = os.environ.get("MATILDA_DEVICE", "cpu")
SHAPES = [(1, 24), (3, 32), (17, 40), (64, 32), (32, 64), (32, 32), (40, 17), (33, 33)]
if DEVICE == "cuda":
    SHAPES += [(768, 768), (256, 768), (768, 256), (1536, 384)]


class Weights(nn.Module):
    """Plain matrices, an odd vector and a matrix for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for i, shape in enumerate(SHAPES):
            setattr(self, f"w{i}", nn.Parameter(torch.randn(shape, generator=g)))
        self.vector = nn.Parameter(torch.randn(7, generator=g))
        self.table = nn.Parameter(torch.randn(10, 6, generator=g))
        self.to(DEVICE)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The elements as stored; without numpy, which this package does not need."""
    return bytes(tensor.cpu().contiguous().view(-1).view(torch.uint8).tolist())


def optimizer_of(model: nn.Module, **options: Any) -> Muon:
    named = dict(model.named_parameters())
    matrices = [(n, p) for n, p in named.items() if n.startswith("w")]
    rest = [(n, p) for n, p in named.items() if not n.startswith("w")]
    groups = [
        {"params": matrices, "name": "hidden"},
        {"params": rest, "name": "rest", "algorithm": "adamw"},
    ]
    return Muon(groups, lr=0.02, ns_coefficients="polar_express", **options)


def train(
    model: nn.Module,
    optimizer: Muon,
    first: int,
    last: int,
    place: Callable[[Tensor, Tensor], Tensor] = lambda grad, p: grad,
) -> None:
    """Steps with seeded gradients; `place` puts one into its parameter's layout."""
    for step in range(first, last):
        g = torch.Generator().manual_seed(100 + step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=g).to(DEVICE)
            p.grad = place(grad, p)
        optimizer.step()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def digest(model: nn.Module, optimizer: Muon) -> str:
    sha = hashlib.sha256()
    for name, p in model.named_parameters():
        sha.update(name.encode() + raw_bytes(whole(p.detach())))
        for key in sorted(optimizer.state[p]):
            sha.update(raw_bytes(whole(optimizer.state[p][key])))
    return sha.hexdigest()


def alone() -> str:
    """The digest of plain tensors in one process."""
    model = Weights()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, STEPS)
    return digest(model, optimizer)
