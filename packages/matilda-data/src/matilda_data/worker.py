"""Worker processes that encode units, which arrive as JSON lines.

Plain subprocesses rather than `multiprocessing`, so that calling `prepare_text` needs no
`if __name__ == "__main__"` guard, forks nothing and leaves no shared memory. A worker ends when its
standard input does: a parent that was killed leaves no orphan.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from matilda_data.documents import ReadOptions
from matilda_data.errors import DataError
from matilda_data.inputs import Unit
from matilda_data.parts import PartRecord, encode_unit

__all__ = ["RUNNERS", "EncodeSettings", "load_runner", "record_of", "reply_to", "run_units"]

RUNNERS = ("local", "ray")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

WORKER_PROGRAM = "from matilda_data.worker import main; main()"

# A unit whose worker dies (out of memory, killed) is tried this many times.
TRIES = 3
# A worker is replaced after this many units (2 GB of text): the caches of tokenizers only grow.
UNITS_PER_WORKER = 128


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """What a worker needs beside the unit."""

    directory: str
    tokenizer: str
    backend: str
    options: ReadOptions

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EncodeSettings:
        value = json.loads(text)
        return cls(**{**value, "options": ReadOptions(**value["options"])})

    def encode(self, unit: Unit, key: str) -> PartRecord:
        """Encode `unit` in this process."""
        return encode_unit(
            unit,
            key,
            Path(self.directory),
            tokenizer=self.tokenizer,
            backend=self.backend,
            options=self.options,
        )


def run_units(
    work: Sequence[tuple[str, Unit]], settings: EncodeSettings, workers: int
) -> Generator[PartRecord, None, None]:
    """Encode all of `work` (key, unit), yielding records as parts become durable, in any order.

    Raises:
        DataError: what a worker found wrong with its input; the other workers are stopped.
        OSError: what kept a worker from its work, such as a full disk; a `ChildProcessError` for a
            unit whose worker died `TRIES` times.
    """
    if workers <= 1:
        for key, unit in work:
            yield settings.encode(unit, key)
        return
    todo: queue.SimpleQueue[tuple[str, Unit] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[PartRecord | BaseException] = queue.SimpleQueue()
    for item in work:
        todo.put(item)
    for _ in range(workers):
        todo.put(None)
    processes: list[subprocess.Popen[str]] = []
    lock, stopping = threading.Lock(), threading.Event()

    def start() -> subprocess.Popen[str]:
        with lock:
            if stopping.is_set():
                raise RuntimeError("stopping")
            process = _start_worker(settings)
            processes.append(process)
            return process

    def serve() -> None:
        try:
            process, served = start(), 0
            while (item := todo.get()) is not None and not stopping.is_set():
                if served == UNITS_PER_WORKER:
                    _retire(process)
                    process, served = start(), 0
                served += 1
                for attempt in range(TRIES):
                    reply = _ask(process, *item)
                    if reply is not None:
                        done.put(record_of(reply))
                        break
                    if stopping.is_set():
                        return
                    process.kill()  # also one that lives and answers nonsense
                    process.wait()
                    if attempt == TRIES - 1:
                        names = ", ".join(file.name for file in item[1].files[:3])
                        raise ChildProcessError(
                            f"a worker died {TRIES} times on {names} (exit status "
                            f"{process.returncode}; -9 often means out of memory)"
                        )
                    process = start()
        except BaseException as error:
            done.put(error)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for _ in work:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        with lock:
            stopping.set()
        for process in processes:
            process.kill()
        for thread in threads:
            thread.join()
        for process in processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)


def load_runner(name: str) -> Callable[..., Generator[PartRecord, None, None]]:
    """The function that runs units: `run_units` for `"local"`, or that of the Ray extra.

    Raises:
        DataError: unknown, or Ray is not installed.
    """
    if name not in RUNNERS:
        raise DataError(f"`runner` is {name!r}; choose one of {', '.join(map(repr, RUNNERS))}")
    if name == "local":
        return run_units
    from matilda_data.ray_runner import run_units_on_ray

    return run_units_on_ray


def _retire(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        _close(process.stdin)
    process.wait()


def _close(pipe: IO[str]) -> None:
    with contextlib.suppress(OSError):  # the worker is gone, and so is what was buffered for it
        pipe.close()


def _start_worker(settings: EncodeSettings) -> subprocess.Popen[str]:
    package_root = str(Path(__file__).resolve().parents[1])
    search = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        # Not `-m`: the package imports this module, so that would run it twice, with a warning.
        [sys.executable, "-c", WORKER_PROGRAM, settings.to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": search, "RAYON_NUM_THREADS": "1"},
        process_group=0,  # Ctrl-C is for the parent alone
    )


def _ask(process: subprocess.Popen[str], key: str, unit: Unit) -> dict[str, Any] | None:
    """The worker's reply, or None when it died."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("worker without pipes")
    try:
        process.stdin.write(json.dumps({"key": key, "unit": unit.to_json()}) + "\n")
        process.stdin.flush()
        reply: dict[str, Any] = json.loads(process.stdout.readline())
    except (OSError, ValueError):
        return None
    return reply


def reply_to(unit: Unit, key: str, settings: EncodeSettings) -> dict[str, Any]:
    """Encode `unit` in this process; what `record_of` takes, so that errors too can travel."""
    try:
        return {"record": settings.encode(unit, key).to_json()}
    except DataError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"os_error": [error.errno, error.strerror, error.filename]}
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {error}"}


def record_of(reply: Mapping[str, Any]) -> PartRecord:
    """The record in a reply of `reply_to`, or the error."""
    if "error" in reply:
        raise DataError(reply["error"])
    if "os_error" in reply:
        raise OSError(*reply["os_error"])
    if "fault" in reply:
        raise RuntimeError(f"a worker failed: {reply['fault']}")
    return PartRecord(**reply["record"])


def main() -> None:
    """Serve units until standard input ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the parent's to handle; it ends this one's input
    settings = EncodeSettings.from_json(sys.argv[1])
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)  # the parent closed the pipe or died: stop even in mid-unit

    threading.Thread(target=listen, daemon=True).start()
    while True:
        request = json.loads(requests.get())
        reply = reply_to(Unit.from_json(request["unit"]), request["key"], settings)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
