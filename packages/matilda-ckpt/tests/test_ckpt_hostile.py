"""Directories written by an enemy: a typed error, bounded time and memory, nothing executed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matilda_ckpt import Checkpointer, CheckpointError, load_state, verify
from matilda_ckpt.manifest import Commit, parse_commit, parse_manifest
from matilda_ckpt.strict_json import loads

FULL = os.environ.get("MATILDA_SLOW") == "1"
EXAMPLES = int(os.environ.get("MATILDA_FUZZ_EXAMPLES", 100_000 if FULL else 300))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    import torch

    with Checkpointer(tmp_path) as checkpoints:
        state = {"model": {"w": torch.arange(10.0)}, "loop": {"step": 1, "t": (1, 2)}}
        return checkpoints.save(1, state).path


def reseal(path: Path, edit: Callable[[dict], None] | bytes) -> None:
    """Change the manifest and seal the change: an enemy can do that."""
    if isinstance(edit, bytes):
        data = edit
    else:
        manifest = json.loads((path / "MANIFEST.json").read_bytes())
        edit(manifest)
        data = json.dumps(manifest).encode()
    (path / "MANIFEST.json").write_bytes(data)
    (path / "COMMIT").write_bytes(Commit.of(data).to_bytes())


def rename_file(new: str) -> Callable[[dict], None]:
    def edit(manifest: dict) -> None:
        manifest["files"][new] = manifest["files"].pop("loop.json")
        manifest["state"]["loop"]["json"] = new

    return edit


def tensor(**change: object) -> Callable[[dict], None]:
    def edit(manifest: dict) -> None:
        manifest["files"]["model.safetensors"]["tensors"]["w"].update(change)

    return edit


def put(key: str, value: object) -> Callable[[dict], None]:
    return lambda manifest: manifest.__setitem__(key, value)


HUGE = 1 << 61
EDITS: dict[str, Callable[[dict], None] | bytes] = {
    "path traversal": rename_file("../../loop.json"),
    "absolute path": rename_file("/etc/passwd"),
    "dot dot": rename_file(".."),
    "hidden": rename_file(".bashrc"),
    "nul": rename_file("a\0b"),
    "separator": rename_file("a/b"),
    "backslash": rename_file("..\\a"),
    "long name": rename_file("a" * 5000),
    "itself": rename_file("MANIFEST.json"),
    "no files": put("files", {}),
    "files is a list": put("files", []),
    "no state": put("state", {}),
    "step is a float": put("step", 1.0),
    "step is true": put("step", True),
    "negative step": put("step", -1),
    "other step": put("step", 2),
    "huge step": put("step", 1 << 70),
    "other format": put("format", "matilda-ckpt/2"),
    "parent is no hash": put("parent", "../x"),
    "huge shape": tensor(shape=[HUGE, HUGE]),
    "shape that overflows to the right size": tensor(shape=[1 << 32, 1 << 32, 10]),
    "many dimensions": tensor(shape=[1] * 10_000),
    "negative shape": tensor(shape=[-10]),
    "shape of strings": tensor(shape=["10"]),
    "shape of booleans": tensor(shape=[True]),
    "offsets backwards": tensor(offsets=[40, 0]),
    "offsets far away": tensor(offsets=[HUGE, HUGE + 40]),
    "unknown dtype": tensor(dtype="PICKLE"),
    "other dtype": tensor(dtype="F64"),
    "hash is short": tensor(sha256="00"),
    "upper case hash": tensor(sha256="A" * 64),
    "other tree": lambda m: m["files"]["model.safetensors"].update(tree_sha256="0" * 64),
    "origin is a path": lambda m: m["files"]["model.safetensors"].update(origin="../x"),
    "huge header": lambda m: m["files"]["model.safetensors"].update(header_size=HUGE),
    "huge file": lambda m: m["files"]["loop.json"].update(size=HUGE),
    "huge tensor file": lambda m: m["files"]["model.safetensors"].update(size=HUGE),
    "state names a missing file": lambda m: m["state"]["loop"].update(json="x.json"),
    "two names share a file": lambda m: m["state"].update(other=m["state"]["loop"]),
    "state name is a path": lambda m: m["state"].update({"../x": m["state"].pop("loop")}),
    "metrics are text": lambda m: m["health"].update(metrics={"a": "b"}),
    "not JSON": b"\x80\x04\x95",
    "not UTF-8": b'"\xff"',
    "empty": b"",
    "null": b"null",
    "NaN": b'{"format":NaN}',
    "1e999": b'{"format":1e999}',
    "huge integer": b'{"format":' + b"9" * 100_000 + b"}",
    "duplicate key": b'{"format":"matilda-ckpt/1","format":"matilda-ckpt/1"}',
    "deep list": b"[" * 1_000_000 + b"]" * 1_000_000,
    "deep object": b'{"a":' * 500_000 + b"1" + b"}" * 500_000,
    "unclosed": b"[" * 1_000_000,
}


@pytest.mark.parametrize("name", EDITS)
def test_hostile_manifest_is_a_typed_error(checkpoint: Path, name: str) -> None:
    reseal(checkpoint, EDITS[name])
    tracemalloc.start()
    report = verify(checkpoint)
    with pytest.raises(CheckpointError):
        load_state(checkpoint)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not report.ok
    assert len(str(report.problem)) < 1000
    assert peak < 100e6


def test_oversized_manifest_and_commit_are_not_read(checkpoint: Path) -> None:
    for file in ("MANIFEST.json", "COMMIT"):
        before = (checkpoint / file).read_bytes()
        os.truncate(checkpoint / file, 1 << 40)
        assert "more than" in str(verify(checkpoint).problem)
        (checkpoint / file).write_bytes(before)
    assert verify(checkpoint).ok


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": "nope"},
        {"$tensor": "w", "in": "nobody"},
        {"$tensor": ["w"]},
        {"$ndarray": "nope"},
        {"$pickle": "gASV"},
        {"$dict": [[{"$dict": []}, 1]]},
        {"$dict": [[1]]},
        {"$dict": 3},
        {"$tuple": 3},
        {"$bytes": "%%%"},
        {"$float": "1"},
        {"$torch_dtype": "load"},
        {"$torch_device": "rm -rf"},
        {"$tuple": [], "$dict": []},
        {"$ordered": [[1, 2, 3]]},
    ],
    ids=str,
)
def test_hostile_state_tree_is_a_typed_error(checkpoint: Path, tree: object) -> None:
    data = json.dumps(tree).encode()
    (checkpoint / "loop.json").write_bytes(data)
    reseal(
        checkpoint,
        lambda m: m["files"]["loop.json"].update(
            size=len(data), sha256=hashlib.sha256(data).hexdigest()
        ),
    )
    with pytest.raises(CheckpointError):
        load_state(checkpoint)


def test_header_that_contradicts_the_manifest_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = data[8 : 8 + length].replace(b"F32", b"I32")
    changed = data[:8] + header + data[8 + length :]
    path.write_bytes(changed)

    def edit(manifest: dict) -> None:
        entry = manifest["files"]["model.safetensors"]
        entry["header_sha256"] = hashlib.sha256(changed[: 8 + length]).hexdigest()
        lines = f"{entry['header_sha256']}\n{entry['tensors']['w']['sha256']}\n"
        entry["tree_sha256"] = hashlib.sha256(lines.encode()).hexdigest()

    reseal(checkpoint, edit)
    assert "contradicts the manifest" in str(verify(checkpoint).problem)


def test_links_fifos_and_devices_are_never_opened(checkpoint: Path, tmp_path: Path) -> None:
    for file in ("MANIFEST.json", "COMMIT", "loop.json", "model.safetensors"):
        real = checkpoint / file
        moved = tmp_path / "moved"
        real.rename(moved)
        real.symlink_to(moved)
        assert not verify(checkpoint).ok
        real.unlink()
        os.mkfifo(real)
        assert not verify(checkpoint).ok
        real.unlink()
        real.mkdir()
        assert not verify(checkpoint).ok
        real.rmdir()
        moved.rename(real)
    assert verify(checkpoint).ok
    link = tmp_path / "step-00000009"
    link.symlink_to(checkpoint)
    assert [info.step for info in Checkpointer(tmp_path, read_only=True).list()][-1] == 1


def test_many_entries_are_listed_in_bounded_time(checkpoint: Path, tmp_path: Path) -> None:
    for i in range(1_000_000 if FULL else 20_000):
        os.close(os.open(checkpoint / f"f{i}", os.O_CREAT))
    assert "is not part of this checkpoint" in str(verify(checkpoint).problem)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=300))
def test_fuzzed_bytes_parse_or_raise_value_error(data: bytes) -> None:
    for parse in (parse_manifest, parse_commit, lambda d: loads(d, "x")):
        with contextlib.suppress(ValueError):
            parse(data)


GOOD = {
    "format": "matilda-ckpt/1",
    "step": 1,
    "sequence": 1,
    "run_id": "r",
    "created": "2026-01-01T00:00:00+00:00",
    "parent": None,
    "health": {"healthy": True, "finite": True, "metrics": {"a": 1.0}},
    "provenance": {},
    "files": {
        "x.json": {"size": 3, "sha256": "0" * 64},
        "x.safetensors": {
            "size": 108,
            "tree_sha256": hashlib.sha256(("0" * 64 + "\n").encode() * 2).hexdigest(),
            "origin": "1" * 64,
            "header_size": 100,
            "header_sha256": "0" * 64,
            "tensors": {"w": {"dtype": "F32", "shape": [2], "offsets": [0, 8], "sha256": "0" * 64}},
        },
    },
    "state": {"x": {"json": "x.json", "tensors": ["x.safetensors"]}},
}


def paths(value: object, prefix: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    found = [prefix] if prefix else []
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        found += paths(item, (*prefix, key))
    return found


def test_the_manifest_that_fuzzing_starts_from_is_good() -> None:
    assert parse_manifest(json.dumps(GOOD).encode()).step == 1


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from(paths(GOOD)), json_values, st.booleans())
def test_fuzzed_fields_parse_or_raise_value_error(
    path: tuple[object, ...], value: object, remove: bool
) -> None:
    manifest = json.loads(json.dumps(GOOD))
    node = manifest
    for key in path[:-1]:
        node = node[key]
    if remove:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    with contextlib.suppress(ValueError):
        parsed = parse_manifest(json.dumps(manifest).encode())
        assert all("/" not in name and not name.startswith(".") for name in parsed.files)


@settings(
    max_examples=EXAMPLES // 10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(file=st.integers(0, 4), position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(checkpoint: Path, file: int, position: float, bit: int) -> None:
    path = sorted(checkpoint.iterdir())[file]
    before = path.read_bytes()
    changed = bytearray(before)
    changed[int(position * len(before))] ^= 1 << bit
    path.write_bytes(changed)
    try:
        report = verify(checkpoint)
        assert not report.ok
        assert path.name in str(report.problem)
    finally:
        path.write_bytes(before)
