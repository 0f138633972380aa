"""MANIFEST.json and COMMIT: what a checkpoint holds, and the seal over it.

The parser treats both as hostile input: every path is a plain file name, every size is bounded
and every tensor tiles its file exactly. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from matilda_ckpt import strict_json
from matilda_ckpt.strict_json import JSON

FORMAT = "matilda-ckpt/1"
MANIFEST_NAME = "MANIFEST.json"
COMMIT_NAME = "COMMIT"
MAX_MANIFEST_BYTES = 64 << 20
MAX_JSON_BYTES = 64 << 20
MAX_COMMIT_BYTES = 4096
MAX_HEADER_BYTES = 64 << 20
MAX_RUN_ID = 256
"""Characters; the lock file, which holds it too, is read back up to 4,096 bytes."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_STATE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Names of the safetensors format and their widths."""


@dataclass(frozen=True)
class TensorEntry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the data part of the file (after the safetensors header)."""
    end: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    size: int
    sha256: str
    """Of the bytes; for a tensor file `tree_sha256`, so that every byte is hashed only once."""
    header_size: int = 0
    """Bytes before the tensor data (8 + header); 0 for files without tensors."""
    header_sha256: str = ""
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    origin: str = ""
    """SHA-256 of the manifest of the checkpoint whose save wrote these bytes to disk, when they
    are shared with it; "" when this save wrote them."""


@dataclass(frozen=True)
class StateEntry:
    """Which files hold one name of the saved mapping."""

    json: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything a checkpoint says about itself; sealed by the hash in COMMIT."""

    step: int
    sequence: int
    """1 for the first save into a directory, one more for each later one: "newest" means this."""
    run_id: str
    created: str
    """UTC, ISO 8601."""
    parent: str | None
    """SHA-256 of the previous checkpoint's manifest: the chain of a run."""
    healthy: bool
    finite: bool
    metrics: Mapping[str, float]
    provenance: Mapping[str, JSON]
    files: Mapping[str, FileEntry]
    state: Mapping[str, StateEntry]

    def to_bytes(self) -> bytes:
        body: dict[str, object] = {
            "format": FORMAT,
            "step": self.step,
            "sequence": self.sequence,
            "run_id": self.run_id,
            "created": self.created,
            "parent": self.parent,
            "health": {
                "healthy": self.healthy,
                "finite": self.finite,
                "metrics": {k: strict_json.encode_float(v) for k, v in self.metrics.items()},
            },
            "provenance": dict(self.provenance),
            "files": {name: _file_json(entry) for name, entry in self.files.items()},
            "state": {
                name: {"json": entry.json, "tensors": list(entry.tensors)}
                for name, entry in self.state.items()
            },
        }
        return strict_json.dumps(body)

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())


@dataclass(frozen=True)
class Commit:
    manifest_sha256: str
    manifest_size: int

    def to_bytes(self) -> bytes:
        return strict_json.dumps(
            {
                "format": FORMAT,
                "manifest_sha256": self.manifest_sha256,
                "manifest_size": self.manifest_size,
            }
        )

    @staticmethod
    def of(manifest: bytes) -> Commit:
        return Commit(hashlib.sha256(manifest).hexdigest(), len(manifest))


def tree_sha256(header_sha256: str, tensors: Mapping[str, TensorEntry]) -> str:
    """SHA-256 over a line for the header and one for each tensor in file order.

    Each line is a SHA-256 in hexadecimal and a newline. Header and tensors tile the file, so that
    this changes when any byte does; `sha256sum` of the parts gives the lines.
    """
    ordered = sorted(tensors.values(), key=lambda t: (t.start, t.end))
    # Tensors without elements share an offset and a hash: their order cannot matter.
    lines = [header_sha256, *(tensor.sha256 for tensor in ordered)]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode("ascii")).hexdigest()


def check_state_name(name: object) -> str:
    """ValueError unless `name` can name files on every file system."""
    if (
        not isinstance(name, str)
        or not _STATE_NAME.fullmatch(name)
        or name.lower() in ("manifest", "commit")
    ):
        raise ValueError(
            f"state name {name!r} cannot be stored; use letters, digits, `_` and `-`, "
            "at most 64, beginning with a letter or digit, and not `manifest` or `commit`"
        )
    return name


def check_run_id(run_id: object) -> str:
    """ValueError unless `run_id` fits into the manifest and the lock file."""
    if not isinstance(run_id, str) or len(run_id) > MAX_RUN_ID:
        raise ValueError(
            f"`run_id` must be a string of at most {MAX_RUN_ID} characters, "
            f"not {str(run_id)[:40]!r}"
        )
    return run_id


def sealed(manifest: Manifest) -> tuple[bytes, Commit]:
    """What MANIFEST.json and COMMIT will hold; ValueError when a reader would refuse either."""
    data = manifest.to_bytes()
    commit = Commit.of(data)
    parse_commit(commit.to_bytes())
    parse_manifest(data)
    return data, commit


def parse_commit(data: bytes) -> Commit:
    raw = _object(strict_json.loads(data, COMMIT_NAME), COMMIT_NAME)
    _check_format(raw, COMMIT_NAME)
    commit = Commit(
        _sha(raw, "manifest_sha256", COMMIT_NAME),
        _integer(raw, "manifest_size", COMMIT_NAME, MAX_MANIFEST_BYTES),
    )
    if data != commit.to_bytes():
        raise ValueError(f"`{COMMIT_NAME}` holds more than the seal")
    return commit


def parse_manifest(data: bytes) -> Manifest:
    """ValueError (one sentence, naming the field) when anything is not as we would write it."""
    what = MANIFEST_NAME
    raw = _object(strict_json.loads(data, what), what)
    _check_format(raw, what)
    health = _object(raw.get("health"), f"{what}: health")
    files = {
        _file_name(name): _parse_file(name, value)
        for name, value in _object(raw.get("files"), f"{what}: files").items()
    }
    if len({name.lower() for name in files}) != len(files):
        raise ValueError(f"`{what}` lists two files whose names differ only in case")
    if MANIFEST_NAME in files or COMMIT_NAME in files:
        raise ValueError(f"`{what}` lists itself or `{COMMIT_NAME}` as content")
    state = {
        check_state_name(name): _parse_state(name, value, files)
        for name, value in _object(raw.get("state"), f"{what}: state").items()
    }
    _check_every_file_used_once(files, state)
    parent = raw.get("parent")
    if parent is not None and not (isinstance(parent, str) and _SHA256.fullmatch(parent)):
        raise ValueError(f"`{what}`: `parent` is not a SHA-256")
    return Manifest(
        step=_integer(raw, "step", what),
        sequence=_integer(raw, "sequence", what),
        run_id=_string(raw, "run_id", what),
        created=_string(raw, "created", what),
        parent=parent,
        healthy=_boolean(health, "healthy", what),
        finite=_boolean(health, "finite", what),
        metrics={
            key: strict_json.decode_float(value)
            for key, value in _object(health.get("metrics"), f"{what}: metrics").items()
        },
        provenance=_object(raw.get("provenance"), f"{what}: provenance"),
        files=files,
        state=state,
    )


def _file_json(entry: FileEntry) -> dict[str, JSON]:
    if not entry.header_size:
        return {"size": entry.size, "sha256": entry.sha256}
    result: dict[str, JSON] = {"size": entry.size, "tree_sha256": entry.sha256}
    if entry.origin:
        result["origin"] = entry.origin
    if entry.header_size:
        result["header_size"] = entry.header_size
        result["header_sha256"] = entry.header_sha256
        result["tensors"] = {
            name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "offsets": [tensor.start, tensor.end],
                "sha256": tensor.sha256,
            }
            for name, tensor in entry.tensors.items()
        }
    return result


def _parse_file(name: str, value: JSON) -> FileEntry:
    what = f"{MANIFEST_NAME}: files: {name[:80]}"
    raw = _object(value, what)
    size = _integer(raw, "size", what)
    if "tensors" not in raw:
        sha256 = _sha(raw, "sha256", what)
        if name.endswith(".safetensors"):
            raise ValueError(f"`{what}` lists no tensors")
        if size > MAX_JSON_BYTES:
            raise ValueError(f"`{what}` is {size} bytes, more than the {MAX_JSON_BYTES} allowed")
        return FileEntry(size, sha256)
    header_size = _integer(raw, "header_size", what, MAX_HEADER_BYTES)
    tensors = {
        tensor: _parse_tensor(f"{what}: {tensor[:80]}", entry)
        for tensor, entry in _object(raw["tensors"], what).items()
    }
    position = 0
    for tensor, entry in sorted(tensors.items(), key=lambda kv: (kv[1].start, kv[1].end)):
        if entry.start != position:
            raise ValueError(f"`{what}`: tensor {tensor[:80]!r} leaves a gap or overlaps")
        position = entry.end
    if header_size < 8 or header_size + position != size:
        raise ValueError(f"`{what}`: header and tensors do not add up to {size} bytes")
    tree, header = _sha(raw, "tree_sha256", what), _sha(raw, "header_sha256", what)
    if tree != tree_sha256(header, tensors):
        raise ValueError(f"`{what}`: `tree_sha256` is not that of its header and tensors")
    origin = _sha(raw, "origin", what) if "origin" in raw else ""
    return FileEntry(size, tree, header_size, header, tensors, origin)


def _parse_tensor(what: str, value: JSON) -> TensorEntry:
    raw = _object(value, what)
    dtype = _string(raw, "dtype", what)
    if dtype not in DTYPE_BITS:
        raise ValueError(f"`{what}` has unknown dtype {dtype[:40]!r}")
    shape, offsets = raw.get("shape"), raw.get("offsets")
    if (
        not isinstance(shape, list)
        or len(shape) > 64
        or not all(type(d) is int and 0 <= d < 1 << 62 for d in shape)
    ):
        raise ValueError(f"`{what}` has no valid shape")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(o) is int and 0 <= o < 1 << 62 for o in offsets)
    ):
        raise ValueError(f"`{what}` has no valid offsets")
    dims = [int(str(d)) for d in shape]
    start, end = (int(str(o)) for o in offsets)
    if math.prod(dims) * DTYPE_BITS[dtype] // 8 != end - start:
        raise ValueError(f"`{what}`: shape and dtype do not fit its {end - start} bytes")
    return TensorEntry(dtype, tuple(dims), start, end, _sha(raw, "sha256", what))


def _parse_state(name: str, value: JSON, files: Mapping[str, FileEntry]) -> StateEntry:
    what = f"{MANIFEST_NAME}: state: {name[:80]}"
    raw = _object(value, what)
    json_file, tensors = raw.get("json"), raw.get("tensors")
    if not isinstance(json_file, str) or json_file not in files or files[json_file].header_size:
        raise ValueError(f"`{what}` names no listed JSON file")
    if not isinstance(tensors, list):
        raise ValueError(f"`{what}` has no list of tensor files")
    names = []
    for item in tensors:
        if not isinstance(item, str) or item not in files or not files[item].header_size:
            raise ValueError(f"`{what}` names a tensor file that is not listed")
        names.append(item)
    return StateEntry(json_file, tuple(names))


def _check_every_file_used_once(
    files: Mapping[str, FileEntry], state: Mapping[str, StateEntry]
) -> None:
    used = [name for entry in state.values() for name in (entry.json, *entry.tensors)]
    if sorted(used) != sorted(files):
        raise ValueError(f"`{MANIFEST_NAME}`: files and state do not list the same files")


def _check_format(raw: Mapping[str, JSON], what: str) -> None:
    found = raw.get("format")
    if found != FORMAT:
        raise ValueError(
            f"`{what}` has format {str(found)[:80]!r}, this version reads {FORMAT!r}; "
            "use the matilda-ckpt that wrote it"
        )


def _file_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"`{MANIFEST_NAME}` lists {name[:80]!r}, which is not a plain file name")
    return name


def _object(value: JSON, what: str) -> dict[str, JSON]:
    if not isinstance(value, dict):
        raise ValueError(f"`{what}` is not a JSON object")
    return value


def _integer(raw: Mapping[str, JSON], key: str, what: str, limit: int = 1 << 62) -> int:
    value = raw.get(key)
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"`{what}`: `{key}` is not an integer between 0 and {limit}")
    return value


def _string(raw: Mapping[str, JSON], key: str, what: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or len(value) > 4096:
        raise ValueError(f"`{what}`: `{key}` is not a short string")
    return value


def _boolean(raw: Mapping[str, JSON], key: str, what: str) -> bool:
    value = raw.get(key)
    if not isinstance(value, bool):
        raise ValueError(f"`{what}`: `{key}` is not true or false")
    return value


def _sha(raw: Mapping[str, JSON], key: str, what: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"`{what}`: `{key}` is not a SHA-256")
    return value
