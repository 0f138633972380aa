"""Texts that a row only points to, by git blob id: the Software Heritage store of Python-Edu."""

from __future__ import annotations

import gzip
import hashlib
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from matilda_data.errors import DataError
from matilda_data.persistence import BelievedError, Retry

__all__ = ["SOFTWARE_HERITAGE", "fetch_blobs"]

SOFTWARE_HERITAGE = "https://softwareheritage.s3.amazonaws.com/content/{blob_id}"
CONNECTIONS = 32
TIMEOUT_SECONDS = 30.0


class _NotThereError(Exception):
    """The store says that it has no such content, which may be a passing trouble of its own."""


def fetch_blobs(url: str, blob_ids: Sequence[str], retry: Retry) -> list[str]:
    """The texts of `blob_ids`, undecodable bytes as U+FFFD; "" for what the store does not have.

    Each content is checked against its id (the SHA-1 of a git blob), so that a cut or garbled
    answer is asked for again. "Not there" (403 or 404) must be said three times in a row.
    """
    stopping = threading.Event()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        try:
            return list(pool.map(lambda blob_id: _fetch(url, blob_id, retry, stopping), blob_ids))
        finally:
            stopping.set()  # on an error or Ctrl-C, nothing is waited for


def _fetch(url: str, blob_id: str, retry: Retry, stopping: threading.Event) -> str:
    address = url.format(blob_id=blob_id)

    def get() -> bytes:
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as response:
                raw: bytes = response.read()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (403, 404):
                raise _NotThereError(f"HTTP status {error.code}") from None
            raise
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        sha1 = hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()
        if sha1 != blob_id:
            raise DataError(f"the content at {address!r} is not the one asked for")
        return raw

    try:
        content = retry.call(
            get, f"fetching {address!r}", final=(_NotThereError,), stopping=stopping
        )
    except BelievedError:
        return ""
    return content.decode("utf-8", errors="replace")
