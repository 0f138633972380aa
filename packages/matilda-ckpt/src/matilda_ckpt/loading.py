"""From a verified checkpoint directory to plain Python data."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from matilda_ckpt import strict_json
from matilda_ckpt.errors import DamagedError
from matilda_ckpt.manifest import Manifest, TensorEntry
from matilda_ckpt.state_tree import decode
from matilda_ckpt.store import Store, each

if TYPE_CHECKING:
    import numpy as np
    import torch


def load_names(
    store: Store, name: str, manifest: Manifest, wanted: Collection[str]
) -> dict[str, object]:
    """Nested data of the `wanted` names; only their files are read, every byte of them verified.

    DamagedError when a file is not what the manifest says.
    """
    trees = {}
    for state_name in wanted:
        file = manifest.state[state_name].json
        data = store.read_json(name, manifest, file)
        try:
            trees[state_name] = strict_json.loads(data, file)
        except ValueError as error:
            raise DamagedError(f"checkpoint `{store.root}/{name}`: {error}") from error
    leaves = _Leaves(store, name, manifest, _owners(trees, wanted))
    try:
        return {
            state_name: decode(state_name, tree, leaves.tensor, leaves.array)
            for state_name, tree in trees.items()
        }
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"checkpoint `{store.root}/{name}`: {error}") from error


def _owners(trees: dict[str, Any], wanted: Collection[str]) -> set[str]:
    """Names whose tensor files are needed: the wanted ones and those they share tensors with."""
    owners = set(wanted)
    stack = list(trees.values())
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            owner = node.get("in")
            if isinstance(owner, str) and any(key.startswith("$") for key in node):
                owners.add(owner)
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
    return owners


class _Leaves:
    """Every tensor of the needed files, read once; numpy or torch is decided by who asks."""

    def __init__(self, store: Store, name: str, manifest: Manifest, owners: set[str]) -> None:
        self._tensors: dict[tuple[str, str], torch.Tensor] = {}
        self._entries: dict[tuple[str, str], TensorEntry] = {}
        owner_of = {
            file: owner
            for owner, entry in manifest.state.items()
            if owner in owners
            for file in entry.tensors
        }

        def read(file: str) -> None:
            def allocate(key: str, entry: TensorEntry) -> memoryview:
                from matilda_ckpt import torch_tensors

                tensor, view = torch_tensors.empty(entry.dtype, entry.shape)
                self._tensors[owner_of[file], key] = tensor
                self._entries[owner_of[file], key] = entry
                return view

            store.read_tensors(name, manifest, file, allocate)

        each(read, list(owner_of), store.threads)

    def tensor(self, owner: str, key: str) -> torch.Tensor:
        found = self._tensors.get((owner, key))
        if found is None:
            raise ValueError(f"state {owner[:80]!r} has no stored tensor {key[:80]!r}")
        return found

    def array(self, owner: str, key: str) -> np.ndarray[Any, Any]:
        from matilda_ckpt import numpy_arrays, torch_tensors

        tensor = self.tensor(owner, key)
        array, view = numpy_arrays.empty(self._entries[owner, key].dtype, tuple(tensor.shape))
        if len(view):
            view[:] = torch_tensors.byte_view(tensor)
        return array
