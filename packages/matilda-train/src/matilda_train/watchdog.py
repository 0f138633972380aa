"""A thread that ends a process which hangs, and says where, so that a launcher can restart it.

A peer that is gone silent in a collective, a data set on a disk that no longer answers: such a wait
has no end of its own. Every safe point of the loop (each asks whether to stop) and every change of
phase is a sign of life, and costs one clock read. Without any for `hang_seconds` the process names
its rank, phase and step and the line of code it is at, dumps the stacks of all threads, and ends
with `EXIT_HUNG`; the newest checkpoint stands.

Several ranks tell each other every few seconds how they are, through the store that joined them, so
that the one who waits can name the one who is silent. What the thread cannot see is a call that
never lets go of the interpreter; torch's collectives, file reads and CUDA's waits do.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from matilda_train.metrics_log import EventLog
from matilda_train.phases import PhaseClock
from matilda_train.stop_signals import say

__all__ = ["EXIT_HUNG", "Watchdog"]

EXIT_HUNG = 5
"""Exit code of a process that made no progress for too long: run it again."""

STARTUP_PATIENCE = 4
LONGEST_POLL_SECONDS = 5.0


class Store(Protocol):
    """The part of torch's key-value store that is used here."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


class Watchdog:
    """Watches one process from entering the context to leaving it; None seconds: not at all.

    Until the first training step has ended (data are prepared, kernels compiled) the patience is
    four times `hang_seconds`. A process that was itself suspended (Ctrl-Z, a scheduler) starts
    counting anew.
    """

    def __init__(
        self,
        hang_seconds: float | None,
        *,
        phase: PhaseClock,
        step: Callable[[], int],
        run_dir: Path | None,
    ) -> None:
        self._hang_seconds = hang_seconds or 0.0
        self._phase = phase
        self._step = step
        self._run_dir = run_dir
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = 1
        self._store: Store | None = None
        self._main_thread = threading.get_ident()
        self._poll = min(LONGEST_POLL_SECONDS, self._hang_seconds / 4)
        self._sign_of_life = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._hang_seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    def listen(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """`stop` itself, whose every call is now a sign of life."""

        def asked() -> bool:
            self._sign_of_life = time.monotonic()
            return stop()

        return asked

    def exchange(self, store: Store | None, world_size: int) -> None:
        """From now on tell the other ranks through `store` how this one is."""
        if store is not None and self._hang_seconds > 0:
            self._store, self._world_size = store, world_size
            threading.Thread(target=self._tell, name="watchdog-tell", daemon=True).start()

    def _silence(self, now: float) -> float:
        return now - max(self._sign_of_life, self._phase.since)

    def _watch(self) -> None:
        woke = time.monotonic()
        while not self._ended.wait(self._poll):
            now = time.monotonic()
            if now - woke > 3 * self._poll + 1:
                self._sign_of_life = now  # the whole process stood still
            woke = now
            patience = self._hang_seconds * (1 if self._phase.warm else STARTUP_PATIENCE)
            if self._silence(now) > patience:
                self._end(self._silence(now))

    def _end(self, silence: float) -> None:
        state = self._describe(silence)
        headline = (
            f"\nerror: rank {self._rank} hangs: {state}; it ends itself with exit code "
            f"{EXIT_HUNG}, and the newest checkpoint stands (`train.hang_seconds`).\n"
        )
        say(headline)
        faulthandler.dump_traceback(file=2, all_threads=True)
        # A disk or a store that hangs must not hold this up.
        record = threading.Thread(target=self._record, args=(headline, silence), daemon=True)
        record.start()
        record.join(3 * self._poll + 10)
        if not self._ended.is_set():
            os._exit(EXIT_HUNG)

    def _record(self, headline: str, silence: float) -> None:
        peers = self._ask_peers()
        say(peers)
        if self._run_dir is None or not (self._run_dir / "run.json").is_file():
            return
        step = self._step()
        folder = self._run_dir / "hangs"
        folder.mkdir(exist_ok=True)
        with (folder / f"step-{step:08d}-rank-{self._rank}-{os.getpid()}.txt").open("w") as file:
            file.write(headline.lstrip() + peers + "\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        EventLog(self._run_dir / "events.jsonl", enabled=self._rank == 0).write(
            "hang",
            step=step,
            phase=self._phase.current,
            silent_seconds=round(silence, 1),
            peers=peers.splitlines(),
        )

    def _describe(self, silence: float) -> str:
        return (
            f"no progress for {silence:.0f} s while {self._phase.current}, at step "
            f"{self._step()}, {self._place()}"
        )

    def _place(self) -> str:
        """The innermost line of this project's code that the main thread is at."""
        frame = sys._current_frames().get(self._main_thread)
        while frame is not None and "matilda_" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None:
            return "in a place unknown"
        name = Path(frame.f_code.co_filename).name
        return f"in `{frame.f_code.co_name}` ({name}, line {frame.f_lineno})"

    def _tell(self) -> None:
        assert self._store is not None
        told = 0
        while not self._ended.wait(self._poll):
            told += 1
            news = {"told": told, "state": self._describe(self._silence(time.monotonic()))}
            try:
                self._store.set(f"watchdog/{self._rank}", json.dumps(news))
            except RuntimeError:
                return  # the store is gone, and the run with it

    def _ask_peers(self) -> str:
        """A line for each other rank: what it says of itself, or that it is silent."""
        if self._store is None:
            return ""
        try:
            before = self._heard_of()
            time.sleep(2 * self._poll)
            after = self._heard_of()
        except RuntimeError as error:
            return f"The other ranks cannot be asked: {error}\n"
        lines = []
        for rank, news in after.items():
            silent = news is None or before[rank] == news
            last = news["state"] if news else "nothing yet"
            lines.append(
                f"rank {rank} is silent (stopped, dead or cut off); its last words: {last}\n"
                if silent
                else f"rank {rank} lives: {last}\n"
            )
        return "".join(lines)

    def _heard_of(self) -> dict[int, dict[str, Any] | None]:
        assert self._store is not None
        heard: dict[int, dict[str, Any] | None] = {}
        for rank in range(self._world_size):
            if rank != self._rank:
                key = f"watchdog/{rank}"
                heard[rank] = json.loads(self._store.get(key)) if self._store.check([key]) else None
        return heard
