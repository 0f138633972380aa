"""Turn SIGTERM, SIGINT and SIGUSR1 into a request that the loop honours at the next safe point.

Imports nothing but the standard library, so that an app can install the handlers before the
seconds-long import of torch.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

__all__ = ["EXIT_PREEMPTED", "StopRequest"]

EXIT_PREEMPTED = 75
"""Exit code after a clean save on request (EX_TEMPFAIL): a launcher should run it again."""


class StopRequest:
    """Becomes true when one of `SIGNALS` arrives; a second SIGINT ends the process at once.

    With `grace_seconds`, a process that is still there so long after the first signal ends with
    `EXIT_PREEMPTED`, wherever it hangs; its newest durable checkpoint stands.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, grace_seconds: float | None = None) -> None:
        if grace_seconds is not None and not grace_seconds > 0:
            raise ValueError(f"`--grace-seconds` is {grace_seconds:g}, but must be above 0.")
        self.signal_name: str | None = None
        self._grace_seconds = grace_seconds

    def install(self) -> StopRequest:
        """Handle the signals from now on; call it from the main thread."""
        for number in self.SIGNALS:
            signal.signal(number, self._handle)
        if self._grace_seconds is not None:
            # Python's own handlers wait for the main thread, which may hang in a collective.
            arrived, note = os.pipe()
            os.set_blocking(note, False)
            signal.set_wakeup_fd(note, warn_on_full_buffer=False)
            threading.Thread(target=self._enforce, args=(arrived,), daemon=True).start()
        return self

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            os.write(2, b"\nStopped at once; the newest checkpoint stands.\n")
            os._exit(128 + signal.SIGINT)
        first = self.signal_name is None
        self.signal_name = signal.Signals(number).name
        if first:
            note = f"\n{self.signal_name}: saving at the next step, then stopping."
            hint = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
            os.write(2, f"{note}{hint}\n".encode())

    def _enforce(self, arrived: int) -> None:
        assert self._grace_seconds is not None
        while os.read(arrived, 1)[0] not in self.SIGNALS:
            pass
        time.sleep(self._grace_seconds)
        text = f"\nNot done within {self._grace_seconds:g} s; the newest checkpoint stands.\n"
        os.write(2, text.encode())
        os._exit(EXIT_PREEMPTED)
