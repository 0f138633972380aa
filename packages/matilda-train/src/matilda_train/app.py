"""How every app ends: one sentence for a person, one exit code for a launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

__all__ = ["run_app"]

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_ENVIRONMENT = 4


def run_app(main: Callable[[], int]) -> None:
    """Exit with what `main` returns, or with the code of the error it raises.

    2: bad input (`ValueError`). 3: the loss diverged. 4: the environment failed (disk full,
    unreadable file, no valid checkpoint among those there, a kernel that computes wrongly). Set
    `MATILDA_DEBUG=1` for tracebacks.
    """
    try:
        sys.exit(main())
    except Exception as error:
        code = _exit_code(error)
        if code is None or os.environ.get("MATILDA_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    from matilda_ckpt import CheckpointError
    from matilda_model import KernelMismatchError
    from matilda_train.errors import TrainingDivergedError

    if isinstance(error, TrainingDivergedError):
        return EXIT_DIVERGED
    if isinstance(error, CheckpointError | KernelMismatchError | OSError):
        return EXIT_ENVIRONMENT
    return EXIT_BAD_INPUT if isinstance(error, ValueError) else None
