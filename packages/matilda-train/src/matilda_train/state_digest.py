"""A whole training state in memory: its values by name, and a digest fast enough for every save."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["digest", "leaves"]

WORDS_AT_ONCE = 1 << 21
"""So that 64 MiB are enough on a GPU that is nearly full."""


def digest(state: Mapping[str, object]) -> str:
    """Hexadecimal digest of `state`: objects with `state_dict`, or nested data, with tensors.

    Each tensor is summed up on its own device, so that a gigabyte on a GPU takes milliseconds: its
    bytes as 64-bit words, each times an odd weight of its own, modulo 2^64. A change of any one
    word always shows, others but for one in 2^64; it is no defence against intent.
    """
    texts: list[str] = []
    sums: list[Tensor] = []
    for name, value in leaves(state):
        if isinstance(value, Tensor):
            texts.append(f"{name} {value.dtype} {tuple(value.shape)}")
            sums.extend(_weighted_sums(value))
        else:
            texts.append(f"{name} {value!r}")
    known = json.dumps([texts, [int(total) for total in sums]])
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path such as `/model/embed.weight`, value) of every tensor and plain value in `state`.

    Objects with `state_dict` stand for what that returns.
    """
    if hasattr(state, "state_dict"):
        state = state.state_dict()
    if isinstance(state, Mapping):
        for key in state:
            yield from leaves(state[key], f"{name}/{key}")
    elif isinstance(state, list | tuple):
        for index, item in enumerate(state):
            yield from leaves(item, f"{name}/{index}")
    else:
        yield name, state


def _weighted_sums(tensor: Tensor) -> list[Tensor]:
    """One int64 scalar for every `WORDS_AT_ONCE` words of the tensor's bytes."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    sums = []
    for part in torch.split(raw, 8 * WORDS_AT_ONCE):
        # Padding copies, too: the words begin where a word may, whatever `tensor` is a view of.
        words = torch.nn.functional.pad(part, (0, -part.numel() % 8)).view(torch.int64)
        weights = 2 * torch.arange(words.numel(), device=words.device) + 1
        sums.append((words * weights).sum())
    return sums
