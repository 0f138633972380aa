"""numpy arrays as raw bytes and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from matilda_ckpt.tensor_file import TensorSource

NUMPY_DTYPES: dict[str, str] = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
    "C64": "<c8",
}
_NAMES = {np.dtype(code): name for name, code in NUMPY_DTYPES.items()}


def source(shown: str, value: Any) -> TensorSource:
    """ValueError for dtypes that safetensors cannot hold (object, strings, complex128), and for
    masked arrays, whose mask would be lost."""
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"state {shown} is a masked array; store its `data` and its `mask`")
    array = np.asarray(value)
    name = _NAMES.get(array.dtype)
    if name is None:
        raise ValueError(f"state {shown} has dtype {array.dtype}, which safetensors cannot hold")

    def read() -> tuple[memoryview, ...]:
        if array.size == 0:
            return ()
        return (np.ascontiguousarray(array).reshape(-1).view(np.uint8).data,)

    return TensorSource(shown, name, tuple(array.shape), read)


def empty(dtype: str, shape: Sequence[int]) -> tuple[np.ndarray[Any, Any], memoryview]:
    """An uninitialised array and a writable view of its bytes; ValueError for a torch dtype."""
    if dtype not in NUMPY_DTYPES:
        raise ValueError(f"numpy has no dtype for {dtype}")
    array: np.ndarray[Any, Any] = np.empty(tuple(shape), dtype=NUMPY_DTYPES[dtype])
    if array.size == 0:
        return array, memoryview(bytearray())
    return array, array.reshape(-1).view(np.uint8).data
