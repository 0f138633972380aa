"""The journal of a preparation: which units are done, one durable line each."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from matilda_data.durable import fsync_directory
from matilda_data.manifest import canonical_json
from matilda_data.parts import PartRecord

__all__ = ["Journal"]

logger = logging.getLogger("matilda_data")


class Journal:
    """Append-only JSON lines, each with a checksum; a damaged or torn line counts as not written.

    Losing a line only means that its unit is done again, with the same bytes.
    """

    def __init__(self, path: Path) -> None:
        self.records: dict[str, PartRecord] = {}
        self._path = path
        raw = path.read_bytes() if path.exists() else b""
        kept: list[bytes] = []
        lines = raw.split(b"\n")
        for number, line in enumerate(lines, start=1):
            record = _parse(line)
            if record is not None:
                self.records[record.unit] = record
                kept.append(line)
            elif line and number < len(lines):
                logger.warning("line %d of %s is damaged; its unit is done again", number, path)
        self._file = path.open("ab")
        fsync_directory(path.parent)
        if b"".join(line + b"\n" for line in kept) != raw:
            self._file.truncate(0)
            self._file.write(b"".join(line + b"\n" for line in kept))
            self._sync()

    def append(self, record: PartRecord) -> None:
        """Record a finished part; durable on return."""
        self.records[record.unit] = record
        body = record.to_json()
        self._file.write(canonical_json({**body, "check": _checksum(body)}) + b"\n")
        self._sync()

    def discard(self, key: str) -> None:
        """Forget a part that turned out to be damaged; a later `append` overrides its old line."""
        self.records.pop(key, None)

    def close(self) -> None:
        """Close the file; every appended line is already durable."""
        self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body)).hexdigest()[:16]


def _parse(line: bytes) -> PartRecord | None:
    try:
        body = json.loads(line)
        check = body.pop("check")
        return PartRecord(**body) if check == _checksum(body) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
