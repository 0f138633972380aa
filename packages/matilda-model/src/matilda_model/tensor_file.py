"""safetensors files, read and written with torch alone.

The format is one page: eight bytes of header length, a JSON header with dtype, shape and byte range
of each tensor, then the bytes, little-endian, row-major.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write float tensors to `path`, through a temporary name so that no half file is left."""
    _require_little_endian()
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            host = tensor.detach().to("cpu").contiguous()
            size = host.numel() * host.element_size()
            # the bytes where they lie: `Tensor.numpy` would need numpy
            file.write((ctypes.c_char * size).from_address(host.data_ptr()))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of `path`, on the CPU. Raises ValueError naming the file when it is missing or
    damaged."""
    _require_little_endian()
    try:
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        if size > min(len(data) - 8, _LARGEST_HEADER):
            raise ValueError("its header is cut off")
        header = json.loads(data[8 : 8 + size])
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        body = memoryview(data)[8 + size :]
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= len(body):
                raise ValueError(f"tensor {name!r} lies outside the file")
            dtype = _DTYPES[entry["dtype"]]
            flat = torch.frombuffer(bytearray(body[start:end]), dtype=dtype)
            tensors[name] = flat.view(entry["shape"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, struct.error) as error:
        raise ValueError(
            f"{str(path)!r} is no readable safetensors file ({error}): copy or export it again"
        ) from error
    return tensors


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise ValueError("safetensors files are little-endian, which this machine is not")
