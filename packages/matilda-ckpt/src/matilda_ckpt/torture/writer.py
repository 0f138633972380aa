"""A torch-free training loop for the crash tests: `python -m matilda_ckpt.torture.writer ROOT A B`.

Saves steps A to B with deterministic temporary names, keeps two, prints `ack N` after each
durable save and `error N …` before it tries step N once more.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable

from matilda_ckpt import strict_json
from matilda_ckpt.errors import CheckpointError
from matilda_ckpt.fs import Fs, OsFs
from matilda_ckpt.retention import Keep
from matilda_ckpt.store import Part, SaveRequest, Store
from matilda_ckpt.tensor_file import TensorSource

TENSOR_BYTES = 3000


class EagerFs(OsFs):
    """Starts write-back even for these few bytes, so that faults meet it too."""

    writeback_bytes = 1024


def content(step: int) -> bytes:
    return bytes((step * 7 + i) % 251 for i in range(TENSOR_BYTES))


def request(step: int, alive: Callable[[], None] = lambda: None) -> SaveRequest:
    data = content(step)
    tensor = TensorSource("w", "U8", (len(data),), lambda: (memoryview(data),))
    part = Part("x", strict_json.dumps({"step": step}), [tensor])
    return SaveRequest(step, [part], True, lambda: True, {}, {}, alive)


def open_store(root: str, fs: Fs | None = None) -> Store:
    count = itertools.count()
    return Store(fs or EagerFs(), root, run_id="torture", nonce=lambda: f"{next(count):08d}")


def judge(root: str, acknowledged: int, fs: Fs | None = None) -> str | None:
    """What is wrong with the directory after a crash, or None."""
    store = open_store(root, fs)
    found = store.scan()
    for info in found:
        if info.problem is not None:
            return f"torn directory: {info.problem}"
    if acknowledged and (not found or found[0].step < acknowledged):
        return f"step {acknowledged} was acknowledged and is lost"
    for info in found:
        try:
            store.verify(info.name)
        except CheckpointError as error:
            return str(error)
        manifest, _ = store.open(info.name)
        data = bytearray(TENSOR_BYTES)
        view = memoryview(data)
        store.read_tensors(info.name, manifest, "x.safetensors", lambda *_, view=view: view)
        text = store.read_json(info.name, manifest, "x.json")
        if bytes(data) != content(info.step) or text != strict_json.dumps({"step": info.step}):
            return f"`{info.name}` holds another state than was saved"
    return None


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def main() -> int:
    root, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store = open_store(root)
    for step in range(first, last + 1):
        for attempt in (1, 2):
            try:
                store.save(request(step))
            except CheckpointError as error:
                say(f"error {step} {error}")
                if attempt == 2:
                    return 1
                continue
            say(f"ack {step}")
            break
        try:
            store.retire(Keep(last=2))
        except OSError as error:
            say(f"kept {step} {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
