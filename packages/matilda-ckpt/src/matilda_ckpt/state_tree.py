"""Nested state ↔ JSON tree + tensors, without pickle and with exact Python types.

Plain JSON values stand for themselves. What JSON cannot say is an object with one `$` key:
`$tensor`, `$ndarray`, `$tuple`, `$float` (nan, infinities), `$bytes`, `$dict` (keys that are not
plain strings; marked `counter` for a Counter, as in MultiStepLR), `$ordered` (OrderedDict, with the
`_metadata` of a module's state_dict).
Only `torch_tensors` knows torch; this file works without it.
"""

from __future__ import annotations

import base64
import sys
from collections import Counter, OrderedDict, defaultdict
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


@dataclass
class _Place:
    """The name that is being encoded."""

    name: str
    taken: set[str] = field(default_factory=lambda: {"__metadata__"})
    result: Encoded = field(default_factory=lambda: Encoded(None))


class Encoder:
    """Encodes the names of one save; tied tensors are stored once over all of them."""

    def __init__(self, snapshot: Snapshot | None = None, *, copy_arrays: bool = False) -> None:
        """Leaves are read when they are written, unless tensors go into a `snapshot` and arrays
        are copied as they are met."""
        self._snapshot = snapshot
        self._copy_arrays = copy_arrays
        self._seen: dict[object, tuple[str, str]] = {}
        self._alive: list[object] = []
        self._torch_tensors: ModuleType | None = None
        self.watch: FiniteWatch | None = None
        """Knows, once everything has been written, whether it was finite; None without tensors."""

    def encode(self, name: str, value: object) -> Encoded:
        """ValueError naming the path when something cannot be stored without pickle."""
        place = _Place(name)
        place.result.tree = self._visit(place, value, ())
        return place.result

    def wait_for_devices(self) -> None:
        """Until what the caller's streams have queued is done: other threads, which know nothing of
        those streams, will read the tensors."""
        if self._torch_tensors is not None:
            self._torch_tensors.wait_for_devices(self._alive)

    # Methods, not closures that call themselves: those would keep every tensor alive until the
    # garbage collector comes.
    def _visit(self, place: _Place, value: object, path: tuple[str, ...]) -> JSON:
        if len(path) > MAX_NESTING:
            raise ValueError(f"state {_shown(place.name, path)} is nested too deeply to be stored")
        if value is None or type(value) in (bool, int, str):
            return value  # type: ignore[return-value]
        if type(value) is float:
            return strict_json.encode_float(value)
        if type(value) in (dict, defaultdict):
            return self._mapping(place, value, path)  # type: ignore[arg-type]
        if type(value) is Counter:
            return {"$dict": self._pairs(place, value, path), "counter": True}
        if type(value) is OrderedDict:
            tree: dict[str, JSON] = {"$ordered": self._pairs(place, value, path)}
            metadata = getattr(value, "_metadata", None)
            if metadata is not None:
                tree["metadata"] = self._visit(place, metadata, (*path, "_metadata"))
            return tree
        if type(value) is list:
            return [self._visit(place, v, (*path, str(i))) for i, v in enumerate(value)]
        if type(value) is tuple:
            return {"$tuple": [self._visit(place, v, (*path, str(i))) for i, v in enumerate(value)]}
        if type(value) is bytes:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        leaf = self._leaf(place, value, path)
        if leaf is not None:
            return leaf
        raise ValueError(
            f"state {_shown(place.name, path)} is a `{type(value).__module__}."
            f"{type(value).__qualname__}`, which cannot be stored without pickle; "
            "give it a state_dict(), or turn it into tensors, dicts, lists and scalars"
        )

    def _mapping(
        self, place: _Place, value: Mapping[object, object], path: tuple[str, ...]
    ) -> JSON:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {
                str(key): self._visit(place, item, (*path, str(key))) for key, item in value.items()
            }
        return {"$dict": self._pairs(place, value, path)}

    def _pairs(self, place: _Place, value: Mapping[object, object], path: tuple[str, ...]) -> JSON:
        return [
            [
                self._visit(place, key, (*path, f"<key {key!r:.40}>")),
                self._visit(place, item, (*path, f"{key!s:.200}")),
            ]
            for key, item in value.items()
        ]

    def _leaf(self, place: _Place, value: object, path: tuple[str, ...]) -> JSON:
        torch = sys.modules.get("torch")
        if torch is not None:
            if isinstance(value, torch.Tensor):
                return self._tensor(place, value, path)
            if isinstance(value, torch.dtype):
                return {"$torch_dtype": str(value).removeprefix("torch.")}
            if isinstance(value, torch.device):
                return {"$torch_device": str(value)}
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
            return self._array(place, value, path)
        return None

    def _tensor(self, place: _Place, value: torch.Tensor, path: tuple[str, ...]) -> JSON:
        if self._torch_tensors is None:
            from matilda_ckpt import torch_tensors

            self._torch_tensors = torch_tensors
        identity = self._torch_tensors.identity(value)
        if identity not in self._seen:
            shown = _shown(place.name, path)
            source = self._torch_tensors.source(shown, value)
            read = source.read
            if self._snapshot is not None:
                read = self._snapshot.add(shown, value)
            self._store(place, identity, value, path, source, read)
        return self._reference("$tensor", identity, place.name)

    def _array(self, place: _Place, value: Any, path: tuple[str, ...]) -> JSON:
        from matilda_ckpt import numpy_arrays

        identity = ("numpy", id(value))
        if identity not in self._seen:
            frozen = value.copy() if self._copy_arrays else value
            source = numpy_arrays.source(_shown(place.name, path), frozen)
            self._store(place, identity, value, path, source, source.read)
        tag = "$ndarray" if type(value).__name__ == "ndarray" else "$numpy_scalar"
        return self._reference(tag, identity, place.name)

    def _store(
        self,
        place: _Place,
        identity: object,
        value: object,
        path: tuple[str, ...],
        source: TensorSource,
        read: Callable[[], Iterable[memoryview]],
    ) -> None:
        self._alive.append(value)  # keeps the identity from being reused during this save
        key = _unique(".".join(path) or "value", place.taken)
        self._seen[identity] = (place.name, key)
        if self.watch is None:
            from matilda_ckpt.finite import FiniteWatch

            self.watch = FiniteWatch()
        watched = self.watch.over(source.dtype, read)
        place.result.tensors.append(TensorSource(key, source.dtype, source.shape, watched))

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

    return _Decoder(name, tensor, array).visit(tree)


@dataclass(frozen=True)
class _Decoder:
    name: str
    tensor: Callable[[str, str], torch.Tensor]
    array: Callable[[str, str], np.ndarray[Any, Any]]

    def visit(self, node: JSON) -> object:
        if isinstance(node, list):
            return [self.visit(item) for item in node]
        if not isinstance(node, dict):
            return node
        tags = [key for key in node if key.startswith("$")]
        if not tags:
            return {key: self.visit(item) for key, item in node.items()}
        if len(tags) != 1:
            raise ValueError(f"state {self.name!r} has an object with the tags {tags!r:.80}")
        return self._special(tags[0], node)

    def _special(self, tag: str, node: dict[str, JSON]) -> object:
        value = node[tag]
        if tag in ("$tensor", "$ndarray", "$numpy_scalar") and isinstance(value, str):
            owner = node.get("in", self.name)
            if not isinstance(owner, str):
                raise ValueError(f"state {self.name!r} refers to a tensor of no name")
            if tag == "$tensor":
                return self.tensor(owner, value)
            found = self.array(owner, value)
            return found if tag == "$ndarray" else found[()]
        if tag == "$tuple" and isinstance(value, list):
            return tuple(self.visit(item) for item in value)
        if tag == "$float":
            return strict_json.decode_float(node)
        if tag == "$bytes" and isinstance(value, str):
            return base64.b64decode(value, validate=True)
        if tag == "$dict":
            plain = dict(self._pairs(value))
            return Counter(plain) if node.get("counter") is True else plain
        if tag == "$ordered":
            ordered = OrderedDict(self._pairs(value))
            if "metadata" in node:
                ordered._metadata = self.visit(node["metadata"])  # type: ignore[attr-defined]
            return ordered
        if tag in ("$torch_dtype", "$torch_device") and isinstance(value, str):
            from matilda_ckpt import torch_tensors

            return torch_tensors.named(tag, value)
        raise ValueError(f"state {self.name!r} has an unknown tag {tag[:40]!r}")

    def _pairs(self, value: JSON) -> list[tuple[Any, object]]:
        if not isinstance(value, list) or not all(
            isinstance(item, list) and len(item) == 2 for item in value
        ):
            raise ValueError(f"state {self.name!r} has a mapping that is not a list of pairs")
        result = []
        for item in value:
            assert isinstance(item, list)
            key = self.visit(item[0])
            try:
                hash(key)
            except TypeError:
                raise ValueError(f"state {self.name!r} has a key that is not hashable") from None
            result.append((key, self.visit(item[1])))
        return result


def _unique(key: str, taken: set[str]) -> str:
    candidate, n = key, 1
    while candidate in taken:
        n += 1
        candidate = f"{key}#{n}"
    taken.add(candidate)
    return candidate


def _shown(name: str, path: tuple[str, ...]) -> str:
    return "`" + ".".join((name, *path)) + "`"
