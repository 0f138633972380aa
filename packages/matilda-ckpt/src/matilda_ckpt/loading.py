"""From a verified checkpoint directory to plain Python data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from matilda_ckpt import strict_json
from matilda_ckpt.catalog import Catalog
from matilda_ckpt.errors import DamagedError
from matilda_ckpt.manifest import Manifest, TensorEntry
from matilda_ckpt.parallel import each
from matilda_ckpt.state_tree import decode
from matilda_ckpt.strict_json import JSON

if TYPE_CHECKING:
    import numpy as np
    import torch

_LEAF_TAGS = {"$tensor", "$ndarray", "$numpy_scalar"}


def load_names(
    store: Catalog, name: str, manifest: Manifest, wanted: Collection[str]
) -> dict[str, object]:
    """Nested data of the `wanted` names; only their files are read, every byte of them verified.

    DamagedError when a file is not what the manifest says.
    """
    trees = load_trees(store, name, manifest, wanted)
    leaves = _Leaves(store, name, manifest, _references(trees))
    try:
        return {
            state_name: decode(state_name, tree, leaves.tensor, leaves.array)
            for state_name, tree in trees.items()
        }
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"checkpoint `{store.root}/{name}`: {error}") from error


def load_trees(
    store: Catalog, name: str, manifest: Manifest, wanted: Collection[str]
) -> dict[str, JSON]:
    """The verified JSON of the `wanted` names, without their tensors."""
    trees = {}
    for state_name in wanted:
        file = manifest.state[state_name].json
        data = store.read_json(name, manifest, file)
        try:
            trees[state_name] = strict_json.loads(data, file)
        except ValueError as error:
            raise DamagedError(f"checkpoint `{store.root}/{name}`: {error}") from error
    return trees


def _references(trees: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """(owner, key) → tag of every leaf that the trees mention; owners can be other names."""
    found = {}
    stack = list(trees.items())
    while stack:
        name, node = stack.pop()
        if isinstance(node, dict):
            for tag in _LEAF_TAGS & node.keys():
                if isinstance(node[tag], str):
                    found[str(node.get("in", name)), node[tag]] = tag
            stack.extend((name, value) for value in node.values())
        elif isinstance(node, list):
            stack.extend((name, value) for value in node)
    return found


class _Leaves:
    """Every tensor of the needed files, read once, as torch's or numpy's by what stored it."""

    def __init__(
        self,
        store: Catalog,
        name: str,
        manifest: Manifest,
        references: Mapping[tuple[str, str], str],
    ) -> None:
        self._tensors: dict[tuple[str, str], torch.Tensor] = {}
        self._arrays: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
        owners = {owner for owner, _ in references}
        owner_of = {
            file: owner
            for owner, entry in manifest.state.items()
            if owner in owners
            for file in entry.tensors
        }

        def read(file: str) -> None:
            def allocate(key: str, entry: TensorEntry) -> memoryview | None:
                leaf = (owner_of[file], key)
                tag = references.get(leaf)
                if tag is None:
                    return None
                if tag == "$tensor":
                    from matilda_ckpt import torch_tensors

                    self._tensors[leaf], view = torch_tensors.empty(entry.dtype, entry.shape)
                else:
                    from matilda_ckpt import numpy_arrays

                    self._arrays[leaf], view = numpy_arrays.empty(entry.dtype, entry.shape)
                return view

            store.read_tensors(name, manifest, file, allocate)

        each(read, list(owner_of), store.threads)

    def tensor(self, owner: str, key: str) -> torch.Tensor:
        found = self._tensors.get((owner, key))
        if found is None:
            raise ValueError(f"state {owner[:80]!r} has no stored tensor {key[:80]!r}")
        return found

    def array(self, owner: str, key: str) -> np.ndarray[Any, Any]:
        found = self._arrays.get((owner, key))
        if found is None:
            raise ValueError(f"state {owner[:80]!r} has no stored array {key[:80]!r}")
        return found
