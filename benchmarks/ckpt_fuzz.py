"""Coverage-guided fuzzing of everything that reads a checkpoint's bytes.

    python benchmarks/ckpt_fuzz.py [--quick] [--runs 1000000] [--peer-dir DIR] [--json FILE]

Needs atheris (Linux, Python up to 3.13), here or in `--peer-dir`. An input becomes, by its first
byte, a manifest, a COMMIT, a safetensors header, a state tree, or a whole file of a checkpoint that
is sealed again around it as an enemy would. Everything must end in a typed error or a value, within
5 seconds and 1 GB; any other exception, hang or growth ends the run with the input that did it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = "/c"
NAME = "step-00000001"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 inputs")
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--peer-dir", type=Path, help="directory with atheris")
    options = parser.parse_args()
    if options.peer_dir is not None:
        sys.path.insert(0, str(options.peer_dir))
    try:
        import atheris
    except ImportError:
        print("FUZZING NOT RUN: atheris is not installed; give `--peer-dir`")
        return 0
    with atheris.instrument_imports(include=["matilda_ckpt"]):
        import matilda_ckpt.catalog
        import matilda_ckpt.loading
        import matilda_ckpt.manifest  # noqa: F401
    runs = 20_000 if options.quick else options.runs
    target = Target()
    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(target.seeds()):
            (Path(corpus) / str(i)).write_bytes(seed)
        begun = time.monotonic()
        child = os.fork()  # libFuzzer ends its process
        if child == 0:
            limits = ["-max_len=6000", "-rss_limit_mb=1024", "-timeout=5", "-seed=1"]
            atheris.Setup(["fuzz", f"-runs={runs}", *limits, corpus], target.one)
            atheris.Fuzz()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    row = {"runs": runs, "exit": status, "seconds": round(time.monotonic() - begun, 1)}
    print(json.dumps(row))
    if options.json:
        options.json.write_text(json.dumps(row) + "\n")
    return status


class Target:
    """A small checkpoint in memory, any part of which can be replaced."""

    def __init__(self) -> None:
        import numpy as np

        from matilda_ckpt.checkpointer import Checkpointer
        from matilda_ckpt.torture.memfs import File, MemFs

        self.fs = MemFs()
        state = {"x": {"w": np.arange(3.0), "n": (1, 2.5, None, b"ab", {3: "c"})}}
        Checkpointer(ROOT, fs=self.fs, threads=1).save(1, state)
        folder: Any = self.fs._find(f"{ROOT}/{NAME}")
        self.files: dict[str, File] = folder.names
        self.before = {name: bytes(file.data) for name, file in self.files.items()}

    def seeds(self) -> list[bytes]:
        order = ("MANIFEST.json", "COMMIT", "x.safetensors", "x.json")
        texts = [self.before[name] for name in order]
        return [bytes([mode]) + text for mode, text in enumerate(texts)] + [
            bytes([mode + 4]) + text for mode, text in enumerate(texts)
        ]

    def one(self, data: bytes) -> None:
        mode, body = data[0] % 8 if data else 0, data[1:]
        if mode < 4:
            self._parse(mode, body)
        else:
            self._whole(("MANIFEST.json", "COMMIT", "x.safetensors", "x.json")[mode - 4], body)

    def _parse(self, mode: int, body: bytes) -> None:
        from matilda_ckpt import strict_json
        from matilda_ckpt.manifest import parse_commit, parse_manifest
        from matilda_ckpt.state_tree import decode
        from matilda_ckpt.tensor_file import header_difference

        entry = parse_manifest(self.before["MANIFEST.json"]).files["x.safetensors"]
        try:
            if mode == 0:
                parse_manifest(body)
            elif mode == 1:
                parse_commit(body)
            elif mode == 2:
                header_difference(body, entry)
            else:
                decode("x", strict_json.loads(body, "x"), _no_leaf, _no_leaf)
        except (ValueError, RecursionError):
            return

    def _whole(self, name: str, body: bytes) -> None:
        """Replace one file, and seal what seals it."""
        import hashlib

        from matilda_ckpt.catalog import Catalog
        from matilda_ckpt.errors import CheckpointError
        from matilda_ckpt.loading import load_names
        from matilda_ckpt.manifest import Commit

        changed = dict(self.before)
        changed[name] = body
        if name in ("x.json", "x.safetensors"):
            manifest = json.loads(self.before["MANIFEST.json"])
            manifest["files"][name]["size"] = len(body)
            if name == "x.json":
                manifest["files"][name]["sha256"] = hashlib.sha256(body).hexdigest()
            changed["MANIFEST.json"] = json.dumps(manifest).encode()
        if name != "COMMIT":
            changed["COMMIT"] = Commit.of(changed["MANIFEST.json"]).to_bytes()
        for file, text in changed.items():
            self.files[file].data[:] = text
        catalog = Catalog(self.fs, ROOT)
        try:
            found = catalog.verify(NAME)
            load_names(catalog, NAME, found, list(found.state))
        except CheckpointError:
            return


def _no_leaf(_owner: str, key: str) -> Any:
    raise ValueError(f"no tensor {key!r}")


if __name__ == "__main__":
    sys.exit(main())
