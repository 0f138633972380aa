"""One save in the background: started, waited for, abandoned; its error always reaches someone.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from matilda_ckpt.catalog import CheckpointInfo
from matilda_ckpt.errors import SaveError
from matilda_ckpt.forked import call_in_forked_child


@dataclass
class SaveHandle:
    """A save that is under way or done."""

    step: int
    stall_s: float = 0.0
    """Seconds for which `save` and `wait_copied` held up their caller."""
    _info: CheckpointInfo | None = field(default=None, repr=False)
    _error: BaseException | None = field(default=None, repr=False)
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)
    _copied: threading.Event = field(default_factory=threading.Event, repr=False)
    _settle: Callable[[], None] = field(default=lambda: None, repr=False)
    _reported: bool = field(default=False, repr=False)

    @property
    def done(self) -> bool:
        """Whether the save has ended, durable or failed."""
        return self._ended.is_set()

    def result(self, timeout_s: float | None = None) -> CheckpointInfo:
        """Wait until the checkpoint is durable.

        Raises SaveError when the save failed and TimeoutError when it is not done in time.
        """
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"the save of step {self.step} is still being written")
        self._raise_error()
        assert self._info is not None
        return self._info

    def wait_copied(self) -> None:
        """Return once nothing of the caller's is read any more; see `Checkpointer.wait_copied`."""
        begun = time.monotonic()
        self._copied.wait()
        self._settle()
        self.stall_s += time.monotonic() - begun

    @property
    def path(self) -> Path:
        """Directory of the durable checkpoint; waits for it."""
        return Path(self.result().path)

    def _end(self, info: CheckpointInfo | None, error: BaseException | None) -> None:
        self._info, self._error = info, error
        self._copied.set()
        self._ended.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            self._reported = True
            raise self._error


def _step_back() -> None:
    """Give way to training on a busy CPU: Linux keeps a niceness for each thread, and threads
    that this one starts inherit it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class Background:
    """At most one save in flight; a failure is raised once, by whoever asks first."""

    def __init__(self) -> None:
        self._current: SaveHandle | None = None
        self._abandoned = threading.Event()
        call_in_forked_child(self.forget)

    def start(
        self, handle: SaveHandle, copy: Callable[[], None], job: Callable[[], CheckpointInfo]
    ) -> None:
        """Run `copy`, which the caller may wait for, and `job` in a thread that a normal
        interpreter exit waits for."""
        assert self._current is None or self._current.done
        self._abandoned.clear()

        def run() -> None:
            try:
                copy()
                handle._copied.set()
                _step_back()
                info = job()
            except BaseException as error:  # handed to the caller, whatever it is
                handle._end(None, error)
            else:
                handle._end(info, None)

        threading.Thread(target=run, name="matilda-ckpt-save", daemon=False).start()
        self._current = handle

    def forget(self) -> None:
        """In a forked process: the save in flight goes on in the other one, its thread is not here.

        Waiting for it would never end; its handle says so to whoever asks.
        """
        handle, self._current = self._current, None
        if handle is None or handle.done:
            return
        # New ones: the thread may have held their locks when the process was copied.
        handle._ended, handle._copied = threading.Event(), threading.Event()
        handle._settle = lambda: None
        handle._end(
            None,
            SaveError(
                f"the save of step {handle.step} goes on in the process that this one was forked "
                "from; ask there"
            ),
        )

    def wait_copied(self) -> None:
        """Return once the save in flight, if any, reads nothing of the caller's any more."""
        if self._current is not None:
            self._current.wait_copied()

    def alive(self) -> None:
        """Raises in the saving thread once its save has been abandoned."""
        if self._abandoned.is_set():
            raise SaveError("the save was abandoned at its deadline; earlier ones are untouched")

    def poll(self) -> bool:
        """True when nothing is in flight. Raises the error of a save that has failed unseen."""
        handle = self._current
        if handle is None:
            return True
        if not handle.done:
            return False
        self._current = None
        self._abandoned.clear()
        if not handle._reported:
            handle._raise_error()
        return True

    def settle(self) -> None:
        """Wait for the save in flight; raises its error unless someone has seen it."""
        handle = self._current
        if handle is not None:
            handle._ended.wait()
            self.poll()

    def finish(self, deadline_s: float | None) -> CheckpointInfo | None:
        """Wait at most `deadline_s` seconds, then abandon; SaveError when it did not make it."""
        handle = self._current
        if handle is None:
            return None
        begun = time.monotonic()
        if not handle._ended.wait(deadline_s):
            self._abandoned.set()
            # The thread notices between two chunks; a hung disk must not hold up the caller.
            handle._ended.wait(0.5)
            if not handle.done:
                handle._reported = True
                raise SaveError(
                    f"the save of step {handle.step} was abandoned after "
                    f"{time.monotonic() - begun:.1f} s; earlier checkpoints are untouched"
                )
        self.poll()
        return handle._info
