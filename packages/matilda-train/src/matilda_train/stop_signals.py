"""Turn SIGTERM, SIGINT and SIGUSR1 into a request that the loop honours at the next safe point.

Imports nothing but the standard library, so that an app can install the handlers in its first line,
before the seconds-long import of torch.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

__all__ = ["EXIT_PREEMPTED", "STOP_SIGNALS", "StopRequest", "end_on_signals", "say"]

EXIT_PREEMPTED = 75
"""Exit code after a clean save on request (EX_TEMPFAIL): a launcher should run it again."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What a person, a launcher or a cluster sends to have a run saved and stopped."""


def say(text: str) -> None:
    """Write to standard error, if that is still possible; safe in a signal handler.

    The disk under a log may be full, and Ctrl-C ends the `tee` behind a pipe too: neither may keep
    the run from being saved.
    """
    with suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))


def end_on_signals() -> None:
    """End with `EXIT_PREEMPTED` at once when a signal arrives, until something else handles them.

    For the first lines of a program whose work can be cut off anywhere: nothing has begun yet.
    """

    for number in STOP_SIGNALS:
        signal.signal(number, _end_before_anything)


def _end_before_anything(number: int, frame: FrameType | None) -> None:
    say(f"\n{signal.Signals(number).name}: stopped before anything began.\n")
    os._exit(EXIT_PREEMPTED)


class StopRequest:
    """Becomes true when one of `STOP_SIGNALS` arrives; a second SIGINT ends the process at once.

    So it does when the terminal is gone (SIGHUP), unless that is ignored, as under `nohup`.

    Until `begin` is called there is nothing to save: the process ends at once, with
    `EXIT_PREEMPTED`, unless it is one of several ranks, which stop together.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._begun = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self._grace_seconds: float | None = None

    def install(self) -> StopRequest:
        """Handle the signals from now on; call it from the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._handle)
        return self

    def begin(self) -> StopRequest:
        """From now on a signal is a request, for there may be something to save."""
        self._begun = True
        return self

    def end_after(self, grace_seconds: float | None) -> StopRequest:
        """Have the process end with `EXIT_PREEMPTED` that long after the first signal; None: never.

        Wherever it hangs by then; its newest durable checkpoint stands. Call it once, from the main
        thread. Raises `ValueError` unless it is above 0 and at most 10^9.
        """
        if grace_seconds is None:
            return self
        if not 0 < grace_seconds <= 1e9:
            raise ValueError(
                f"`--grace-seconds` is {grace_seconds:g}, but must be above 0 and at most 10^9."
            )
        self._grace_seconds = grace_seconds
        # Python's own handlers wait for the main thread, which may hang in a collective.
        arrived, note = os.pipe()
        os.set_blocking(note, False)
        signal.set_wakeup_fd(note, warn_on_full_buffer=False)
        if self:
            os.write(note, bytes([signal.Signals[self.signal_name or "SIGTERM"]]))
        threading.Thread(target=self._enforce, args=(arrived,), daemon=True).start()
        return self

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            say("\nStopped at once; the newest checkpoint stands.\n")
            os._exit(128 + signal.SIGINT)
        if not self._begun:
            _end_before_anything(number, frame)
        first = self.signal_name is None
        self.signal_name = signal.Signals(number).name
        if first:
            note = f"\n{self.signal_name}: saving at the next step, then stopping."
            hint = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
            say(f"{note}{hint}\n")

    def _enforce(self, arrived: int) -> None:
        assert self._grace_seconds is not None
        while os.read(arrived, 1)[0] not in (*STOP_SIGNALS, signal.SIGHUP):
            pass
        time.sleep(self._grace_seconds)
        say(f"\nNot done within {self._grace_seconds:g} s; the newest checkpoint stands.\n")
        os._exit(EXIT_PREEMPTED)
