"""What differs between two checkpoints: tensors by name and by how much, other values by path."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from matilda_ckpt.catalog import Catalog
from matilda_ckpt.errors import DamagedError
from matilda_ckpt.loading import load_trees
from matilda_ckpt.manifest import Manifest, TensorEntry
from matilda_ckpt.reading import open_catalog
from matilda_ckpt.state_tree import decode

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorChange:
    """One stored tensor that is not the same on both sides."""

    name: str
    """State name and tensor key, as in `model/blocks.0.attn.q.weight`."""
    what: str
    """"only in A", "only in B", "dtype or shape", or "values"."""
    differing: int | None = None
    """Elements that are not bitwise equal."""
    elements: int | None = None
    max_abs: float | None = None
    relative_l2: float | None = None
    """‖a − b‖ / ‖a‖ in float64."""


@dataclass(frozen=True)
class Difference:
    """Outcome of `compare`; empty when both hold the same state, bit for bit."""

    equal_tensors: int
    tensors: list[TensorChange] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    """Paths of other values that differ, as in `loop.step: 1 → 2`."""

    @property
    def same(self) -> bool:
        return not self.tensors and not self.values


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Difference:
    """Compare two checkpoint directories, verified as far as they are read.

    Tensors are compared by the hashes in the manifests; only those that differ are loaded, one of
    each side at a time. Raises DamagedError when what is read does not verify.
    """
    one, other = _Side.of(a), _Side.of(b)
    left, right = one.tensors, other.tensors
    equal, changes, unequal = 0, [], []
    for name in sorted(left.keys() | right.keys()):
        x, y = left.get(name), right.get(name)
        if x is None or y is None:
            changes.append(TensorChange(name, "only in B" if x is None else "only in A"))
        elif (x.dtype, x.shape) != (y.dtype, y.shape):
            changes.append(TensorChange(name, "dtype or shape"))
        elif x.sha256 == y.sha256:
            equal += 1
        else:
            unequal.append(name)
    changes += [_measure(name, one.load(name), other.load(name)) for name in unequal]
    leaves_a, leaves_b = _leaves(one.values()), _leaves(other.values())
    values = []
    for path in sorted(leaves_a.keys() | leaves_b.keys()):
        if any(isinstance(leaves.get(path), _Leaf) for leaves in (leaves_a, leaves_b)):
            continue
        before, after = (repr(leaves.get(path, "nothing")) for leaves in (leaves_a, leaves_b))
        if before != after:
            values.append(f"{path}: {before[:60]} → {after[:60]}")
    return Difference(equal, sorted(changes, key=lambda change: change.name), values)


class _Leaf:
    """Where a tensor or an array was: those are compared by name."""

    def __getitem__(self, _index: object) -> _Leaf:
        return self


@dataclass(frozen=True)
class _Side:
    """One of the two checkpoints, opened."""

    catalog: Catalog
    name: str
    manifest: Manifest
    places: Mapping[str, tuple[str, str]]
    """State name and tensor key, as in `model/blocks.0.attn.q.weight` → file, key; the name of the
    file is added where several hold the key."""

    @staticmethod
    def of(path: str | os.PathLike[str]) -> _Side:
        catalog, name = open_catalog(path, None)
        manifest, _ = catalog.open(name)
        found = [
            (state, file, key)
            for state, entry in manifest.state.items()
            for file in entry.tensors
            for key in manifest.files[file].tensors
        ]
        # Each rank of a sharded save has a tensor of the same key.
        files = Counter((state, key) for state, _, key in found)
        places = {
            f"{state}/{key}" + (f" in {file}" if files[state, key] > 1 else ""): (file, key)
            for state, file, key in found
        }
        return _Side(catalog, name, manifest, places)

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        return {
            name: self.manifest.files[file].tensors[key]
            for name, (file, key) in self.places.items()
        }

    def load(self, name: str) -> torch.Tensor:
        """One tensor, verified."""
        from matilda_ckpt import torch_tensors

        file, key = self.places[name]
        entry = self.manifest.files[file].tensors[key]
        tensor, view = torch_tensors.empty(entry.dtype, entry.shape)
        self.catalog.read_one_tensor(self.name, self.manifest, file, key, view)
        return tensor

    def values(self) -> dict[str, object]:
        """All that is no tensor, verified, with a `_Leaf` for each that is one."""

        def leaf(owner: str, key: str) -> Any:
            if f"{owner}/{key}" not in self.places:
                raise ValueError(f"state {owner[:80]!r} has no stored tensor {key[:80]!r}")
            return _Leaf()

        trees = load_trees(self.catalog, self.name, self.manifest, list(self.manifest.state))
        try:
            return {name: decode(name, tree, leaf, leaf) for name, tree in trees.items()}
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"checkpoint `{self.catalog.root}/{self.name}`: {error}") from error


def _leaves(state: dict[str, object]) -> dict[str, object]:
    found: dict[str, object] = {}

    def visit(value: object, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                visit(item, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list | tuple) and value:
            for index, item in enumerate(value):
                visit(item, f"{path}.{index}")
        else:
            found[path] = value

    for name, value in state.items():
        visit(value, name)
    return found


def _measure(name: str, x: torch.Tensor, y: torch.Tensor) -> TensorChange:
    import torch

    raw_x = x.contiguous().reshape(-1).view(torch.uint8).reshape(x.numel(), -1)
    raw_y = y.contiguous().reshape(-1).view(torch.uint8).reshape(y.numel(), -1)
    differing = int((raw_x != raw_y).any(dim=1).sum())
    wide = torch.complex128 if x.is_complex() else torch.float64
    wide_x, wide_y = x.to(wide), y.to(wide)
    gap = (wide_x - wide_y).reshape(-1)
    norm = float(wide_x.norm())
    return TensorChange(
        name,
        "values",
        differing,
        x.numel(),
        float(gap.abs().max()) if gap.numel() else 0.0,
        float(gap.norm()) / norm if norm else math.inf,
    )
