"""Files that are there whole or not at all, in folders that several processes may share."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

__all__ = ["remove_abandoned", "write_whole"]

SUFFIX = ".partial"
MOST_SECONDS = 3600.0
"""No write of a living process takes so long. Its id would say nothing on another machine."""


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, in a folder made if need be; on an error `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut leaves the name and half of the content
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_abandoned(folder: Path) -> None:
    """Delete what killed processes had begun to write in `folder`, not what others write now."""
    for partial in folder.glob(f"*{SUFFIX}"):
        try:
            if time.time() - partial.stat().st_mtime > MOST_SECONDS:
                partial.unlink()
        except FileNotFoundError:  # written, or removed by another process
            continue
