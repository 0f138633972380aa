"""Standard input, output and error as a program may find them: closed, or of another alphabet."""

from __future__ import annotations

import io
import os
import sys

__all__ = ["settle_streams"]


def settle_streams() -> None:
    """Open what is closed (`2>&-`, some launchers) on nothing, and have every text be sayable.

    A file that is opened while a standard stream is closed takes its number, and what is said to
    the stream then goes into that file, a checkpoint perhaps. Call it before anything is opened.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
