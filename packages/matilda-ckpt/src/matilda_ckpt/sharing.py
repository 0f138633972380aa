"""Tensors that did not change since the last checkpoints are not written again.

What had the same SHA-256 in the two newest checkpoints is taken for still and goes into files of
its own. When such a file turns out to hold what the second newest checkpoint already has, byte for
byte, its blocks are shared: by `FICLONE` where the file system copies on write, else by a hard
link.

Shared bytes also rot together. Therefore a file is shared with the *second* newest checkpoint, and
only when the newest holds a copy of its own: of the two newest checkpoints at any time, each has
its own bytes on disk, and one flipped bit never takes both. And the copy is read back and verified
before it is shared: a save never acknowledges what has already rotted.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from matilda_ckpt import system_calls
from matilda_ckpt.catalog import Catalog
from matilda_ckpt.errors import DamagedError, UnreadableError
from matilda_ckpt.manifest import FileEntry, Manifest, TensorEntry
from matilda_ckpt.tensor_file import TensorFilePlan, TensorSource, chunks, plan_tensor_file


@dataclass(frozen=True)
class Before:
    """The newest checkpoint and the one before it, or nothing."""

    newest: Manifest | None = None
    newest_sha256: str = ""
    second: Manifest | None = None
    second_sha256: str = ""
    second_name: str = ""
    still: Mapping[str, Collection[str]] = field(default_factory=dict)
    """State name → keys of the tensors that were equal in both."""


def look_back(catalog: Catalog, at_least: int) -> Before:
    """What the two newest usable checkpoints say about tensors that stand still.

    Names with fewer than `at_least` bytes of them are not worth files of their own.
    """
    found = [info for info in catalog.scan() if info.problem is None]
    found.sort(key=lambda info: -info.sequence)
    if len(found) < 2:
        return Before()
    newest, newest_sha256 = catalog.open(found[0].name)
    second, second_sha256 = catalog.open(found[1].name)
    still = {}
    for name in newest.state.keys() & second.state.keys():
        old, new = _tensors(second, name), _tensors(newest, name)
        keys = {k for k, tensor in new.items() if k in old and old[k].sha256 == tensor.sha256}
        if sum(new[key].end - new[key].start for key in keys) >= at_least:
            still[name] = keys
    return Before(newest, newest_sha256, second, second_sha256, found[1].name, still)


def _tensors(manifest: Manifest, name: str) -> dict[str, TensorEntry]:
    files = (manifest.files[file] for file in manifest.state[name].tensors)
    return {key: tensor for entry in files for key, tensor in entry.tensors.items()}


def plan_files(
    name: str, tensors: Sequence[TensorSource], limit: int, still: Collection[str]
) -> dict[str, TensorFilePlan]:
    """Files of about `limit` bytes for the tensors of one state name; still ones apart."""
    groups: list[list[TensorSource]] = []
    for kind in (False, True):
        room = -1
        for tensor in tensors:
            if (tensor.name in still) is not kind:
                continue
            if tensor.nbytes > room:
                groups.append([])
                room = limit
            groups[-1].append(tensor)
            room -= tensor.nbytes
    if len(groups) == 1:
        return {f"{name}.safetensors": plan_tensor_file(groups[0])}
    count = len(groups)
    return {
        f"{name}-{i + 1:05d}-of-{count:05d}.safetensors": plan_tensor_file(group)
        for i, group in enumerate(groups)
    }


def share(
    catalog: Catalog, before: Before, plan: TensorFilePlan, target: str, alive: Callable[[], None]
) -> FileEntry | None:
    """Make `target` share an older file's blocks; None when this file must be written.

    OSError when what was shared could not be made durable.
    """
    twin = _twin(before, plan)
    if twin is None:
        return None
    file, entry, origin = twin
    for tensor in plan.tensors:
        digest = hashlib.sha256()
        for chunk in chunks(tensor.read()):
            alive()
            digest.update(chunk)
        if digest.hexdigest() != entry.tensors[tensor.name].sha256:
            return None
    assert before.second is not None
    try:
        catalog.read_tensors(before.second_name, before.second, file, lambda _name, _tensor: None)
    except (DamagedError, UnreadableError):
        return None
    source = f"{catalog.root}/{before.second_name}/{file}"
    for make in (catalog.fs.clone, catalog.fs.link):
        try:
            make(source, target)
        except OSError as error:
            if error.errno not in _CANNOT_SHARE:
                raise
            continue
        catalog.fs.fsync_file(target)
        return replace(entry, origin=origin)
    return None


_CANNOT_SHARE = system_calls.UNSUPPORTED | {errno.EMLINK}


def _twin(before: Before, plan: TensorFilePlan) -> tuple[str, FileEntry, str] | None:
    """File of the second newest checkpoint with these tensors, of which the newest has its own."""
    if before.newest is None or before.second is None:
        return None
    header = hashlib.sha256(plan.header).hexdigest()
    for file, entry in before.second.files.items():
        if entry.header_sha256 != header:
            continue
        origin = entry.origin or before.second_sha256
        for other in before.newest.files.values():
            if other.sha256 == entry.sha256 and other.header_size:
                own = other.origin or before.newest_sha256
                if own != origin:
                    return file, entry, origin
    return None
