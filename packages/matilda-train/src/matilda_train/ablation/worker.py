"""A process that trains runs one after another: torch is loaded and a GPU claimed once for many.

It reads a request a line from standard input and writes reports to standard output:
`{"step", "of", "detail"}` while it trains, then `{"outcome", "seconds", …}`. Where the study's own
process is gone, standard input ends, and the run in progress is saved and stopped as by SIGTERM.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matilda_train.stop_signals import EXIT_PREEMPTED, StopRequest, say

__all__ = ["main", "train_job"]

Report = Callable[[dict[str, Any]], None]
LOCK_SECONDS = 120.0


def train_job(request: Mapping[str, Any], stop: Callable[[], bool], report: Report) -> None:
    """Train the run that `Job.request` describes, in this process, and report how it ended.

    `finished`, `preempted`, `diverged` (a result), or `failed` with the `error`: never raises for
    what a run does.
    """
    began = time.monotonic()
    outcome: dict[str, Any]
    turn = _Turn(request["turn"])
    try:
        outcome = _train(request, stop, report, turn)
    except Exception as error:
        from matilda_train.errors import TrainingDivergedError

        diverged = isinstance(error, TrainingDivergedError)
        if not diverged:
            traceback.print_exc()
        outcome = {"outcome": "diverged" if diverged else "failed", "error": _sentence(error)}
    _release_memory()
    turn.release()
    if outcome["outcome"] == "finished" and not request["keep_checkpoints"]:
        for folder in ("checkpoints", "compile-cache"):
            shutil.rmtree(Path(request["run_dir"]) / folder, ignore_errors=True)
    report(outcome | {"seconds": round(time.monotonic() - began, 3)})


def _train(
    request: Mapping[str, Any], stop: Callable[[], bool], report: Report, turn: _Turn
) -> dict[str, Any]:
    import torch
    from torch.compiler._cache import CacheArtifactManager

    from matilda_train.config_load import config_from_dict
    from matilda_train.loop import train

    run_dir = Path(request["run_dir"])
    _wait_for_lock(run_dir, stop)
    config = config_from_dict(request["config"])
    if config.train.compile:
        torch.compiler.reset()  # another row's graphs would count against the limit of variants
        CacheArtifactManager.clear()  # and be saved again in the cache of every later run
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result = train(
        config,
        run_dir=run_dir,
        data_dir=request["data_dir"],
        stop=stop,
        display=_Reporter(report, config.train.total_steps),
        wait_for_turn=turn.wait,
    )
    name = "preempted" if result.status == "preempted" else "finished"
    return {"outcome": name, "step": result.step}


def _wait_for_lock(run_dir: Path, stop: Callable[[], bool]) -> None:
    """Wait while a process of an earlier, killed call still saves this very run."""
    lock = run_dir / "run.lock"
    deadline = time.monotonic() + LOCK_SECONDS
    while lock.is_file() and time.monotonic() < deadline and not stop():
        with lock.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(0.05)


def _release_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sentence(error: Exception) -> str:
    text = str(error).strip().splitlines()[0:1] or ["no message"]
    return text[0] if isinstance(error, ValueError) else f"{type(error).__name__}: {text[0]}"


class _Turn:
    """Of the runs that share a device one trains at a time, from its second step to its end.

    What comes before, compiling above all, is done beside another's training. Without a file
    nobody waits.
    """

    def __init__(self, file: str | None) -> None:
        self._file = Path(file).open("a") if file else None  # noqa: SIM115  (until `release`)

    def wait(self, stop: Callable[[], bool]) -> None:
        while self._file is not None and not stop():
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(0.02)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


class _Reporter:
    """A `Display` that reports the step twice a second, and notes to the log."""

    def __init__(self, report: Report, total: int) -> None:
        self._report = report
        self._total = total
        self._spoke = 0.0

    def begin(self, what: str, *, total: int, done: int = 0) -> None:
        if what == "training":
            self._report({"step": done, "of": total, "detail": ""})

    def advance(self, done: int, detail: str) -> None:
        if time.monotonic() - self._spoke > 0.5:
            self._spoke = time.monotonic()
            self._report({"step": done, "of": self._total, "detail": detail})

    def note(self, text: str) -> None:
        say(f"{text}\n")


def main() -> int:
    """Serve requests until standard input ends; 75 after a stop."""
    stop = StopRequest().install()
    reports = os.dup(1)
    os.dup2(2, 1)  # what libraries print belongs in the log
    requests: queue.Queue[str] = queue.Queue()
    training = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            requests.put(line)
        requests.put("")
        if training.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    def report(row: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more; the run is saved
            os.write(reports, (json.dumps(row) + "\n").encode())

    threading.Thread(target=read, daemon=True).start()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    import torch._dynamo  # noqa: F401  (optimizers load it on first use, for seconds)

    import matilda_train.loop  # noqa: F401

    stop.begin()
    report({"ready": True})
    while not stop:
        try:
            line = requests.get(timeout=0.2)
        except queue.Empty:
            continue
        if not line:
            break
        failed = False

        def pass_on(row: dict[str, Any]) -> None:
            nonlocal failed
            failed = failed or row.get("outcome") == "failed"
            if "outcome" in row:
                training.clear()
            report(row)

        training.set()
        train_job(json.loads(line), lambda: bool(stop), pass_on)
        if failed:
            return 1  # whatever it left behind ends with this process
    return EXIT_PREEMPTED if stop else 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a thread may still wait for standard input
