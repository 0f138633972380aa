"""A file of named arrays: magic, JSON header, raw little-endian columns. Equal input, equal bytes.

Used for the document index beside a shard and for the document table of a prepared part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from matilda_data.errors import DataError
from matilda_data.manifest import canonical_json

__all__ = ["pack_columns", "pack_strings", "string_at", "unpack_columns"]

MAGIC = b"MATLCOL1"
ALIGN = 8

AnyArray = npt.NDArray[Any]


def pack_columns(meta: Mapping[str, Any], columns: Mapping[str, AnyArray]) -> bytes:
    """Bytes that `unpack_columns` gives back as (`meta`, `columns`)."""
    layout: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, column in columns.items():
        little = np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<"))
        blob = little.tobytes()
        layout.append({"name": name, "dtype": little.dtype.str, "shape": list(little.shape)})
        blobs.append(blob + b"\0" * (-len(blob) % ALIGN))
    header = canonical_json({"meta": dict(meta), "columns": layout})
    header += b" " * (-len(header) % ALIGN)
    return MAGIC + len(header).to_bytes(8, "little") + header + b"".join(blobs)


def unpack_columns(raw: bytes, name: str) -> tuple[dict[str, Any], dict[str, AnyArray]]:
    """Meta data and columns (read-only views of `raw`); `name` is used in errors.

    Raises:
        DataError: `raw` is not such a file or has been cut.
    """
    damaged = DataError(f"{name!r} is damaged; restore it or prepare the data set again")
    if raw[:8] != MAGIC or len(raw) < 16:
        raise damaged
    header_bytes = int.from_bytes(raw[8:16], "little")
    try:
        header = json.loads(raw[16 : 16 + header_bytes])
        position, columns = 16 + header_bytes, {}
        for entry in header["columns"]:
            dtype = np.dtype(entry["dtype"])
            count = int(np.prod(entry["shape"], dtype=np.int64))
            flat = np.frombuffer(raw, dtype=dtype, count=count, offset=position)
            columns[str(entry["name"])] = flat.reshape(entry["shape"])
            position += flat.nbytes + (-flat.nbytes % ALIGN)
        meta = dict(header["meta"])
    except (ValueError, KeyError, TypeError):
        raise damaged from None
    if position != len(raw):
        raise damaged
    return meta, columns


def pack_strings(name: str, strings: Sequence[str]) -> dict[str, AnyArray]:
    """Two columns for a list of strings: `<name>_offsets` uint64[n + 1] and `<name>_utf8` uint8."""
    encoded = [string.encode("utf-8") for string in strings]
    offsets = np.zeros(len(encoded) + 1, dtype=np.uint64)
    np.cumsum([len(item) for item in encoded], out=offsets[1:])
    return {
        f"{name}_offsets": offsets,
        f"{name}_utf8": np.frombuffer(b"".join(encoded), dtype=np.uint8),
    }


def string_at(columns: Mapping[str, AnyArray], name: str, index: int) -> str:
    """String `index` of the columns that `pack_strings(name, …)` made."""
    offsets = columns[f"{name}_offsets"]
    start, stop = int(offsets[index]), int(offsets[index + 1])
    return columns[f"{name}_utf8"][start:stop].tobytes().decode("utf-8")
