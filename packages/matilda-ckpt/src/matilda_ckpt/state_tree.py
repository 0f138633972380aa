"""Nested state ↔ JSON tree + tensors, without pickle and with exact Python types.

Plain JSON values stand for themselves. What JSON cannot say is an object with one `$` key:
`$tensor`, `$ndarray`, `$tuple`, `$float` (nan, infinities), `$bytes`, `$dict` (keys that are not
plain strings), `$ordered` (OrderedDict, with the `_metadata` of a module's state_dict).
Only `torch_tensors` knows torch; this file works without it.
"""

from __future__ import annotations

import base64
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from matilda_ckpt import strict_json
from matilda_ckpt.strict_json import JSON
from matilda_ckpt.tensor_file import TensorSource

if TYPE_CHECKING:
    import numpy as np
    import torch

    from matilda_ckpt.finite import FiniteWatch
    from matilda_ckpt.snapshot import Snapshot

MAX_NESTING = 40
"""Levels of a saved state; each costs at most two of JSON's."""


@dataclass
class Encoded:
    """One name of the state, ready for the store."""

    tree: JSON
    tensors: list[TensorSource] = field(default_factory=list)


class Encoder:
    """Encodes the names of one save; tied tensors are stored once over all of them."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        """With a `snapshot`, leaves are frozen as they are met; else they are read when written."""
        self._snapshot = snapshot
        self._seen: dict[object, tuple[str, str]] = {}
        self._alive: list[object] = []
        self._torch_tensors: ModuleType | None = None
        self.watch: FiniteWatch | None = None
        """Knows, once everything has been written, whether it was finite; None without tensors."""

    def encode(self, name: str, value: object) -> Encoded:
        """ValueError naming the path when something cannot be stored without pickle."""
        result = Encoded(None)
        taken: set[str] = {"__metadata__"}

        def visit(value: object, path: tuple[str, ...]) -> JSON:
            if len(path) > MAX_NESTING:
                raise ValueError(f"state {_shown(name, path)} is nested too deeply to be stored")
            if value is None or type(value) in (bool, int, str):
                return value  # type: ignore[return-value]
            if type(value) is float:
                return strict_json.encode_float(value)
            if type(value) in (dict, defaultdict):
                return self._mapping(value, path, visit)  # type: ignore[arg-type]
            if type(value) is OrderedDict:
                tree: dict[str, JSON] = {"$ordered": self._pairs(value, path, visit)}
                metadata = getattr(value, "_metadata", None)
                if metadata is not None:
                    tree["metadata"] = visit(metadata, (*path, "_metadata"))
                return tree
            if type(value) is list:
                return [visit(v, (*path, str(i))) for i, v in enumerate(value)]
            if type(value) is tuple:
                return {"$tuple": [visit(v, (*path, str(i))) for i, v in enumerate(value)]}
            if type(value) is bytes:
                return {"$bytes": base64.b64encode(value).decode("ascii")}
            leaf = self._leaf(name, value, path, taken, result)
            if leaf is not None:
                return leaf
            raise ValueError(
                f"state {_shown(name, path)} is a `{type(value).__module__}."
                f"{type(value).__qualname__}`, which cannot be stored without pickle; "
                "give it a state_dict(), or turn it into tensors, dicts, lists and scalars"
            )

        result.tree = visit(value, ())
        return result

    def _mapping(
        self,
        value: Mapping[object, object],
        path: tuple[str, ...],
        visit: Callable[[object, tuple[str, ...]], JSON],
    ) -> JSON:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {str(key): visit(item, (*path, str(key))) for key, item in value.items()}
        return {"$dict": self._pairs(value, path, visit)}

    def _pairs(
        self,
        value: Mapping[object, object],
        path: tuple[str, ...],
        visit: Callable[[object, tuple[str, ...]], JSON],
    ) -> JSON:
        return [
            [visit(key, (*path, f"<key {key!r:.40}>")), visit(item, (*path, f"{key!s:.200}"))]
            for key, item in value.items()
        ]

    def _leaf(
        self,
        name: str,
        value: object,
        path: tuple[str, ...],
        taken: set[str],
        result: Encoded,
    ) -> JSON:
        torch = sys.modules.get("torch")
        if torch is not None:
            if isinstance(value, torch.Tensor):
                return self._tensor(name, value, path, taken, result)
            if isinstance(value, torch.dtype):
                return {"$torch_dtype": str(value).removeprefix("torch.")}
            if isinstance(value, torch.device):
                return {"$torch_device": str(value)}
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
            return self._array(name, value, path, taken, result)
        return None

    def _tensor(
        self,
        name: str,
        value: torch.Tensor,
        path: tuple[str, ...],
        taken: set[str],
        result: Encoded,
    ) -> JSON:
        if self._torch_tensors is None:
            from matilda_ckpt import torch_tensors

            self._torch_tensors = torch_tensors
        identity = self._torch_tensors.identity(value)
        if identity not in self._seen:
            try:
                source = self._torch_tensors.source("", value)
            except ValueError:
                self._torch_tensors.source(_shown(name, path), value)  # again, with the name
                raise
            read = source.read if self._snapshot is None else self._snapshot.add(value)
            self._store(identity, name, value, path, taken, result, source, read)
        return self._reference("$tensor", identity, name)

    def _array(
        self, name: str, value: Any, path: tuple[str, ...], taken: set[str], result: Encoded
    ) -> JSON:
        from matilda_ckpt import numpy_arrays

        identity = ("numpy", id(value))
        if identity not in self._seen:
            frozen = value if self._snapshot is None else value.copy()
            source = numpy_arrays.source(_shown(name, path), frozen)
            self._store(identity, name, value, path, taken, result, source, source.read)
        tag = "$ndarray" if type(value).__name__ == "ndarray" else "$numpy_scalar"
        return self._reference(tag, identity, name)

    def _store(
        self,
        identity: object,
        name: str,
        value: object,
        path: tuple[str, ...],
        taken: set[str],
        result: Encoded,
        source: TensorSource,
        read: Callable[[], Iterable[memoryview]],
    ) -> None:
        self._alive.append(value)  # keeps the identity from being reused during this save
        key = _unique(".".join(path) or "value", taken)
        self._seen[identity] = (name, key)
        if self.watch is None:
            from matilda_ckpt.finite import FiniteWatch

            self.watch = FiniteWatch()
        watched = self.watch.over(source.dtype, read)
        result.tensors.append(TensorSource(key, source.dtype, source.shape, watched))

    def _reference(self, tag: str, identity: object, name: str) -> JSON:
        owner, key = self._seen[identity]
        return {tag: key} if owner == name else {tag: key, "in": owner}


def decode(
    name: str,
    tree: JSON,
    tensor: Callable[[str, str], torch.Tensor],
    array: Callable[[str, str], np.ndarray[Any, Any]],
) -> object:
    """Inverse of `Encoder.encode`; `tensor(owner, key)` and `array(owner, key)` find leaves.

    ValueError when the tree is not one that the encoder writes.
    """

    def visit(node: JSON) -> object:
        if isinstance(node, list):
            return [visit(item) for item in node]
        if not isinstance(node, dict):
            return node
        tags = [key for key in node if key.startswith("$")]
        if not tags:
            return {key: visit(item) for key, item in node.items()}
        if len(tags) != 1:
            raise ValueError(f"state {name!r} has an object with the tags {tags!r:.80}")
        return special(tags[0], node)

    def special(tag: str, node: dict[str, JSON]) -> object:
        value = node[tag]
        if tag in ("$tensor", "$ndarray", "$numpy_scalar") and isinstance(value, str):
            owner = node.get("in", name)
            if not isinstance(owner, str):
                raise ValueError(f"state {name!r} refers to a tensor of no name")
            if tag == "$tensor":
                return tensor(owner, value)
            found = array(owner, value)
            return found if tag == "$ndarray" else found[()]
        if tag == "$tuple" and isinstance(value, list):
            return tuple(visit(item) for item in value)
        if tag == "$float":
            return strict_json.decode_float(node)
        if tag == "$bytes" and isinstance(value, str):
            return base64.b64decode(value, validate=True)
        if tag == "$dict":
            return dict(pairs(value))
        if tag == "$ordered":
            ordered = OrderedDict(pairs(value))
            if "metadata" in node:
                ordered._metadata = visit(node["metadata"])  # type: ignore[attr-defined]
            return ordered
        if tag in ("$torch_dtype", "$torch_device") and isinstance(value, str):
            from matilda_ckpt import torch_tensors

            return torch_tensors.named(tag, value)
        raise ValueError(f"state {name!r} has an unknown tag {tag[:40]!r}")

    def pairs(value: JSON) -> list[tuple[Any, object]]:
        if not isinstance(value, list) or not all(
            isinstance(item, list) and len(item) == 2 for item in value
        ):
            raise ValueError(f"state {name!r} has a mapping that is not a list of pairs")
        result = []
        for item in value:
            assert isinstance(item, list)
            key = visit(item[0])
            try:
                hash(key)
            except TypeError:
                raise ValueError(f"state {name!r} has a key that is not hashable") from None
            result.append((key, visit(item[1])))
        return result

    return visit(tree)


def _unique(key: str, taken: set[str]) -> str:
    candidate, n = key, 1
    while candidate in taken:
        n += 1
        candidate = f"{key}#{n}"
    taken.add(candidate)
    return candidate


def _shown(name: str, path: tuple[str, ...]) -> str:
    return "`" + ".".join((name, *path)) + "`"
