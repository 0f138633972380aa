"""A torch-free training loop for the crash tests: `python -m matilda_ckpt.torture.writer ROOT A B`.

Saves steps A to B with deterministic temporary names, keeps two, prints `ack N` after each
durable save and `error N …` before it tries step N once more.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Mapping

from matilda_ckpt import strict_json
from matilda_ckpt.errors import CheckpointError
from matilda_ckpt.fs import Fs, OsFs
from matilda_ckpt.manifest import TensorEntry
from matilda_ckpt.retention import Keep
from matilda_ckpt.store import Part, SaveRequest, Store
from matilda_ckpt.tensor_file import TensorSource

TENSOR_BYTES = 3000
STILL = bytes(range(250)) * 12
"""A tensor that never changes: its file is shared between checkpoints."""


class EagerFs(OsFs):
    """Starts write-back even for these few bytes, so that faults meet it too."""

    writeback_bytes = 1024


def content(step: int) -> bytes:
    return bytes((step * 7 + i) % 251 for i in range(TENSOR_BYTES))


def request(step: int, alive: Callable[[], None] = lambda: None) -> SaveRequest:
    data = content(step)
    tensors = [
        TensorSource("w", "U8", (len(data),), lambda: (memoryview(data),)),
        TensorSource("still", "U8", (len(STILL),), lambda: (memoryview(STILL),)),
    ]
    part = Part("x", strict_json.dumps({"step": step}), tensors)
    return SaveRequest(step, [part], True, lambda: True, {}, {}, alive)


def open_store(root: str, fs: Fs | None = None) -> Store:
    count = itertools.count()
    return Store(
        fs or EagerFs(),
        root,
        run_id="torture",
        share_bytes=1,
        nonce=lambda: f"{next(count):08d}",
    )


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
        found_data = {"w": bytearray(TENSOR_BYTES), "still": bytearray(len(STILL))}
        for file in manifest.state["x"].tensors:
            store.read_tensors(info.name, manifest, file, _into(found_data))
        text = store.read_json(info.name, manifest, "x.json")
        expected = {"w": content(info.step), "still": STILL}
        if found_data != expected or text != strict_json.dumps({"step": info.step}):
            return f"`{info.name}` holds another state than was saved"
    return None


def _into(buffers: Mapping[str, bytearray]) -> Callable[[str, TensorEntry], memoryview]:
    return lambda key, _entry: memoryview(buffers[key])


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
