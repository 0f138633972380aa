"""Prepares from the local hub server under faults and kills; prints one JSON object of data ids.

    HF_ENDPOINT=http://127.0.0.1:PORT python hub_driver.py ROOT OUT PORT PLAN TARGET

PLAN lists the number of workers of each preparation that is killed, such as 1,2,5.
Runs in a process of its own because the hub's clients read their endpoint at import; each
preparation is a fork of it, so that a hundred kills need not import `datasets` a hundred times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.errors  # noqa: F401  (imported before the forks)
import pyarrow.parquet  # noqa: F401
import tqdm  # noqa: F401

import matilda_data.engine as engine_module
import matilda_data.inputs as inputs_module
from matilda_data import DataError, HubSource, Progress, Retry, open_dataset, prepare_hub, verify

ROOT, OUT, PORT = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
PLAN, TARGET = list(map(int, sys.argv[4].split(","))), int(sys.argv[5])
RATE = 0.3 if len(PLAN) > 9 else 0.15  # of answers that are faults; each costs a second
SERVER = Path(__file__).with_name("hub_server.py")


def start_server() -> subprocess.Popen[bytes]:
    (ROOT / "port").unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, str(SERVER), str(ROOT), str(PORT)])
    while not (ROOT / "port").exists():
        time.sleep(0.02)
    return process


def sources(revision: str = "main") -> list[HubSource]:
    return [
        HubSource(name=name, dataset="org/mix", config=name, weight=weight, revision=revision)
        for name, weight in (("web", 83), ("code", 17))
    ]


def prepare(out: Path, workers: int, **options: Any) -> str:
    inputs_module.UNIT_BYTES = 20_000
    engine_module.TEXT_WORTH_KEEPING = 1  # it must never be taken for other inputs
    manifest = prepare_hub(
        sources(),
        out,
        target_tokens=TARGET,
        tokenizer="byte",
        shard_tokens=20_000,
        val_fraction=0.05,
        workers=workers,
        retry=Retry(first_wait=0.01, longest_wait=0.1),
        **options,
    )
    return "" if options.get("partition") else manifest.data_id


def in_child(out: Path, workers: int, kill_after: float | None = None, **options: Any) -> bool:
    """Prepare in a fork; True when it finished."""
    child = os.fork()
    if child == 0:
        try:
            prepare(out, workers, **options)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def fetches() -> int:
    """Files of the data set that the server was asked to send so far."""
    log = (ROOT / "requests.log").read_text().splitlines()
    return sum(line.startswith("GET /datasets/") and ".parquet" in line for line in log)


def faults(rate: float, kinds: list[str]) -> None:
    (ROOT / "faults.json").write_text(json.dumps({"rate": rate, "kinds": kinds}))


def main() -> None:
    datasets.disable_progress_bars()
    results: dict[str, object] = {}
    server = start_server()
    try:
        began = time.monotonic()
        assert in_child(OUT / "calm", 1)
        calm = time.monotonic() - began
        results["calm"] = open_dataset(OUT / "calm").data_id
        report = verify(OUT / "calm", deep=True)
        results["tokens"] = report.tokens
        results["left over"] = sorted(
            p.name for p in (OUT / "calm").iterdir() if p.suffix not in (".bin", ".idx")
        )

        faults(RATE, ["500", "429", "garbage", "truncate", "slow", "drop"])
        assert in_child(OUT / "stormy", 1)
        results["stormy"] = open_dataset(OUT / "stormy").data_id

        faults(0.0, [])
        draw = random.Random(7)
        killed = 0
        for workers in PLAN:
            if in_child(OUT / "killed", workers, draw.uniform(0.05, 1.2 * calm)):
                (OUT / "killed").rename(OUT / f"done-{killed}")
                assert open_dataset(OUT / f"done-{killed}").data_id == results["calm"]
                shutil.rmtree(OUT / f"done-{killed}")
            killed += 1
        assert in_child(OUT / "killed", PLAN[-1])
        results["killed"] = open_dataset(OUT / "killed").data_id
        results["kills"] = killed

        # Two machines do a part each, one is killed on the way; a third joins what they did.
        parts = [OUT / f"part-{number}" for number in range(2)]
        in_child(parts[1], 1, 0.4 * calm, partition=(1, 2))
        for number, part in enumerate(parts):
            assert in_child(part, 1, partition=(number, 2))
        before = fetches()
        results["merged"] = prepare(OUT / "merged", 1, merge=parts)
        results["fetched to merge"] = fetches() - before
        results["merged of one"] = prepare(OUT / "one", 1, merge=parts[:1])

        # The server dies in mid-preparation and comes back.
        def restart() -> None:
            nonlocal server
            server.kill()
            server.wait()
            time.sleep(0.5)
            server = start_server()

        restarter = threading.Thread(target=restart)

        def progress(row: Progress) -> None:
            if row.tokens and not restarter.ident:
                restarter.start()

        results["restarted"] = prepare(OUT / "restarted", 1, progress=progress)
        restarter.join()
        results["server ran anew"] = server.poll() is None

        messages = {}
        for what, source in {
            "repository": HubSource(name="a", dataset="org/nothing"),
            "config": HubSource(name="a", dataset="org/mix", config="books"),
            "split": HubSource(name="a", dataset="org/mix", config="web", split="test"),
            "revision": HubSource(name="a", dataset="org/mix", config="web", revision="f" * 40),
        }.items():
            try:
                prepare_hub(
                    [source],
                    OUT / "refused",
                    target_tokens=10,
                    tokenizer="byte",
                    retry=Retry(first_wait=0.01),
                )
            except DataError as error:
                messages[what] = str(error)
        try:
            prepare_hub(
                sources(),
                OUT / "short",
                target_tokens=10**9,
                tokenizer="byte",
                retry=Retry(first_wait=0.01),
            )
        except DataError as error:
            messages["tokens"] = str(error)
        results["messages"] = messages
        results["refused left"] = (OUT / "refused").exists()
    finally:
        server.kill()
        server.wait()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
