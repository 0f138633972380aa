"""What a restore found, and how it reaches the caller's objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matilda_ckpt.catalog import CheckpointInfo
from matilda_ckpt.manifest import Manifest
from matilda_ckpt.rng import RngState


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that `restore` passed over."""

    name: str
    step: int
    reason: str
    moved_to: Path | None = None
    """Its place in `quarantine/`, or None when it was left where it is."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Restored:
    """What `restore` found and did."""

    step: int
    path: Path
    state: dict[str, object]
    """Plain data of the names that no object took."""
    manifest: Manifest
    skipped: tuple[Skipped, ...] = ()


def unwrapped(value: object) -> object:
    """The module inside `torch.compile` and `DistributedDataParallel`, so that keys carry no
    `_orig_mod.` or `module.` and load into any other wrapping."""
    while True:
        if hasattr(value, "_orig_mod"):
            value = value._orig_mod
        elif type(value).__name__ in ("DistributedDataParallel", "DataParallel"):
            value = value.module  # type: ignore[attr-defined]
        else:
            return value


def give(
    info: CheckpointInfo,
    loaded: tuple[Manifest, dict[str, object]],
    into: Mapping[str, object],
    skipped: list[Skipped],
) -> Restored:
    """Hand loaded state to the objects that want it, generators last; the rest is in the result."""
    manifest, state = loaded
    targets = [(n, unwrapped(target)) for n, target in into.items() if target is not None]
    for name, target in targets:
        if not callable(getattr(target, "load_state_dict", None)):
            raise ValueError(
                f"`into[{name!r}]` has no load_state_dict; map it to None to get plain data"
            )
    targets.sort(key=lambda item: isinstance(item[1], RngState))
    for name, target in targets:
        target.load_state_dict(state.pop(name))  # type: ignore[attr-defined]
    return Restored(info.step, Path(info.path), state, manifest, tuple(skipped))
