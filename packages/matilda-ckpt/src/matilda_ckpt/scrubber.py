"""Re-hash kept checkpoints in the background, so that rot is known while a good copy exists."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

from matilda_ckpt.catalog import Catalog
from matilda_ckpt.errors import CheckpointError, DamagedError, OtherFormatError, UnreadableError
from matilda_ckpt.fs import Fs, OsFs
from matilda_ckpt.object_fs import ObjectFs, object_url

_LOG = logging.getLogger("matilda_ckpt")


class Scrubber:
    """A thread that verifies one checkpoint at a time, the longest unchecked first.

    It only reads. What it finds is in `damaged`, goes to the log, and to `on_damage(name, why)`;
    the next `Checkpointer.restore` or `matilda-ckpt repair` quarantines it.

    Args:
        root: directory of the checkpoints, or the URL of a place in object storage.
        every_s: seconds between two checkpoints; reading one at 1.5 GB/s takes seconds.
        on_damage: called in the scrubbing thread.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        every_s: float = 600.0,
        on_damage: Callable[[str, str], None] | None = None,
        fs: Fs | None = None,
    ) -> None:
        if every_s <= 0:
            raise ValueError(f"`every_s` must be positive, not {every_s!r}")
        self.damaged: dict[str, str] = {}
        self.passed_over: dict[str, str] = {}
        """Name → why nothing is known of its bytes: another format, or the system refuses."""
        self.checked: dict[str, float] = {}
        """Name → monotonic time of its last check."""
        url = object_url(root)
        if url is not None:
            self._catalog = Catalog(fs or ObjectFs(url), url)
        else:
            self._catalog = Catalog(fs or OsFs(), os.path.abspath(root))  # noqa: PTH100
        self._every_s = every_s
        self._on_damage = on_damage
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="matilda-ckpt-scrub", daemon=True)

    def start(self) -> Scrubber:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask the thread to end after the checkpoint it is reading, and wait for it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def scrub_one(self) -> str | None:
        """Verify the checkpoint that was checked longest ago; its name, or None without any."""
        names = [info.name for info in self._catalog.scan()]
        self.checked = {n: t for n, t in self.checked.items() if n in names}
        self.passed_over = {n: w for n, w in self.passed_over.items() if n in names}
        if not names:
            return None
        name = min(names, key=lambda n: self.checked.get(n, -1.0))
        try:
            self._catalog.verify(name)
        except DamagedError as error:
            # Retention may have taken it away while we were reading.
            if self._catalog.holds(name):
                self._report(name, str(error))
        except (OtherFormatError, UnreadableError) as error:
            self._pass_over(name, str(error))
        else:
            self.damaged.pop(name, None)
            self.passed_over.pop(name, None)
        finally:
            # Or it would be the longest unchecked for ever, and no other had its turn.
            self.checked[name] = time.monotonic()
        return name

    def _pass_over(self, name: str, why: str) -> None:
        if self.passed_over.get(name) != why:
            self.passed_over[name] = why
            _LOG.warning("%s", why)

    def _report(self, name: str, why: str) -> None:
        if self.damaged.get(name) == why:
            return
        self.damaged[name] = why
        _LOG.warning("%s", why)
        if self._on_damage is not None:
            self._on_damage(name, why)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.scrub_one()
            except (OSError, CheckpointError) as error:
                _LOG.warning("scrubbing `%s` failed: %s", self._catalog.root, error)

    def __enter__(self) -> Scrubber:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
