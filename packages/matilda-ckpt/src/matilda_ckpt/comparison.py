"""What differs between two checkpoints: tensors by name and by how much, other values by path."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

from matilda_ckpt.errors import DamagedError
from matilda_ckpt.manifest import Manifest, TensorEntry
from matilda_ckpt.reading import load_state, verify


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
    """Compare two checkpoint directories, verified while they are read.

    Tensors are compared by the hashes in the manifests; only those that differ are loaded.
    Raises DamagedError when one does not verify.
    """
    left, right = _tensors(_manifest(a)), _tensors(_manifest(b))
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
    state_a, state_b = load_state(a), load_state(b)
    leaves_a, leaves_b = _leaves(state_a), _leaves(state_b)
    by_hash = _values_by_key(leaves_a), _values_by_key(leaves_b)
    changes += [_measure(name, by_hash[0].get(name), by_hash[1].get(name)) for name in unequal]
    values = []
    for path in sorted(leaves_a.keys() | leaves_b.keys()):
        if _is_array(leaves_a.get(path)) or _is_array(leaves_b.get(path)):
            continue
        before, after = (repr(leaves.get(path, "nothing")) for leaves in (leaves_a, leaves_b))
        if before != after:
            values.append(f"{path}: {before[:60]} → {after[:60]}")
    return Difference(equal, sorted(changes, key=lambda change: change.name), values)


def _manifest(path: str | os.PathLike[str]) -> Manifest:
    report = verify(path, deep=False)
    if report.manifest is None:
        raise DamagedError(str(report.problem))
    return report.manifest


def _tensors(manifest: Manifest) -> dict[str, TensorEntry]:
    return {
        f"{name}/{key}": tensor
        for name, entry in manifest.state.items()
        for file in entry.tensors
        for key, tensor in manifest.files[file].tensors.items()
    }


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


def _values_by_key(leaves: dict[str, object]) -> dict[str, object]:
    """`model.blocks.0.w` → `model/blocks.0.w`, the name under which a tensor is stored."""
    return {path.replace(".", "/", 1): value for path, value in leaves.items()}


def _is_array(value: object) -> bool:
    return type(value).__module__.partition(".")[0] in ("torch", "numpy") and hasattr(
        value, "dtype"
    )


def _measure(name: str, a: object, b: object) -> TensorChange:
    if not _is_array(a) or not _is_array(b):
        return TensorChange(name, "values")
    import torch

    x, y = torch.as_tensor(a), torch.as_tensor(b)
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
