"""Data speed: matilda-data beside litdata, mosaicml-streaming, datasets, datatrove and nanochat.

    python benchmarks/data.py [--quick] [--only NAME…] [--input FILE…] [--json FILE]
        [--peer-dir DIR]

Every system gets the same text, the same GPT-2 tokens and one core, in a process of its own per
task (`data_peers.py`); those that are not installed are left out by name. Text comes from `--input`
(`.jsonl`, `.jsonl.zst`) or is Python's standard library. Figures per core divide by CPU seconds of
the process and its children, so that other load on the machine matters less; wall time is beside.
`--peer-dir` holds checkouts: `nanochat`, the others are packages. `--only` takes names of systems
and `verification`, the opening and hashing of a large data set.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from matilda_data import BinStream, open_dataset, prepare_text, verify

HERE = Path(__file__).parent
NEEDS = {
    "matilda": "matilda_data",
    "matilda-tiktoken": "matilda_data",
    "litdata": "litdata",
    "mosaicml-streaming": "streaming",
    "datasets+torchdata": "torchdata",
    "datatrove": "datatrove",
    "nanochat": "nanochat",
}
TASK_SECONDS = 900
YOUNG_SECONDS = 1.2  # files younger than a second are not stamped as verified


def write_corpus(inputs: list[Path], path: Path, limit: int) -> int:
    """One .jsonl with up to `limit` bytes of text; the bytes written."""
    size = 0
    with path.open("w", encoding="utf-8") as out:
        for text in read_texts(inputs):
            out.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size >= limit:
                break
    return size


def read_texts(inputs: list[Path]) -> Any:
    from matilda_data.documents import ReadOptions, read_documents
    from matilda_data.inputs import find_files, plan_units

    library = [Path(sysconfig.get_path("stdlib"))]
    skip = ("test", "tests", "site-packages", "idlelib", "lib2to3")
    for unit in plan_units(find_files(inputs or library, exclude=skip, include=None)):
        for document in read_documents(unit, ReadOptions()):
            yield document.text


def run(
    name: str, task: str, corpus: Path, work: Path, seconds: float, search: str
) -> dict[str, Any]:
    """One task of one system on one core."""
    env = {
        **os.environ,
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DATA_BENCH_SECONDS": str(seconds),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": search,
    }
    pin = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    command = [sys.executable, str(HERE / "data_peers.py"), name, task, str(corpus), str(work)]
    try:
        done = subprocess.run(
            pin + command, env=env, capture_output=True, text=True, timeout=TASK_SECONDS
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TASK_SECONDS} s"}
    except (ValueError, IndexError):
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}


def verification(directory: Path, gigabytes: float) -> dict[str, Any]:
    """Open, verify and reopen a data set of about `gigabytes` of shards."""
    rng = np.random.default_rng(0)
    source = directory / "text"
    source.mkdir()
    for number in range(64):
        size = int(gigabytes * 1e9 / 2 / 64)
        raw = rng.integers(97, 123, size, dtype=np.uint8)
        (source / f"{number:02d}.txt").write_bytes(raw.tobytes())
    prepare_text(source, directory / "out", tokenizer="byte", val_fraction=0)
    time.sleep(YOUNG_SECONDS)
    result = {"gigabytes": sum(f.stat().st_size for f in (directory / "out").iterdir()) / 1e9}
    began = time.perf_counter()
    open_dataset(directory / "out")
    result["open_ms"] = 1e3 * (time.perf_counter() - began)
    began = time.perf_counter()
    verify(directory / "out", deep=True)
    result["verify_deep_s"] = time.perf_counter() - began
    began = time.perf_counter()
    BinStream(directory / "out", seq_len=2048, seed=0).take(16)
    result["open_stamped_and_first_batch_ms"] = 1e3 * (time.perf_counter() - began)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; less text, no peers")
    parser.add_argument("--input", nargs="*", type=Path, default=[], help="text to prepare")
    parser.add_argument("--megabytes", type=int, default=64, help="text at most")
    parser.add_argument(
        "--verify-gigabytes", type=float, default=10.0, help="of the data set that is verified"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--peer-dir", type=Path, help="checkouts of peers")
    parser.add_argument(
        "--only", nargs="+", choices=[*NEEDS, "verification"], metavar="NAME", help="these rows"
    )
    options = parser.parse_args()
    seconds = 1.0 if options.quick else 5.0
    names = ["matilda", "matilda-tiktoken"] if options.quick else list(NEEDS)
    names = [name for name in names if name in (options.only or names)]
    checkouts = [
        str(path.resolve()) for path in sorted((options.peer_dir or HERE).glob("nanochat"))
    ]
    sys.path += checkouts
    search = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *checkouts]))
    results: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "systems": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        limit = 4_000_000 if options.quick else options.megabytes * 1_000_000
        results["text_mb"] = write_corpus(options.input, base / "corpus.jsonl", limit) / 1e6
        for name in names:
            if importlib.util.find_spec(NEEDS[name]) is None:
                print(f"{name}: not installed", flush=True)
                continue
            found = {}
            for task in ("prepare", "load", "resume"):
                found[task] = run(name, task, base / "corpus.jsonl", base / name, seconds, search)
                time.sleep(YOUNG_SECONDS)
            results["systems"][name] = found
            print(f"{name}: {json.dumps(found)}", flush=True)
        if "verification" in (options.only or ["verification"]):
            (base / "big").mkdir()
            results["verification"] = verification(
                base / "big", 0.1 if options.quick else options.verify_gigabytes
            )
            print(f"verification: {json.dumps(results['verification'])}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
