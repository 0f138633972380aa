"""torch tensors as raw bytes and back. The only place that knows torch's memory layout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch

from matilda_ckpt.tensor_file import TensorSource

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def source(shown: str, tensor: torch.Tensor) -> TensorSource:
    """ValueError for what has no plain bytes (sparse, nested, quantized, meta, a dtype without a
    name)."""
    if sys.byteorder != "little":
        raise ValueError("checkpoints can be written on little-endian machines only")
    if tensor.is_meta:
        raise ValueError(f"state {shown} is on the meta device: it has no values to store")
    if tensor.is_nested:
        raise ValueError(f"state {shown} is a nested tensor; store its values and its offsets")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"state {shown} is sparse or quantized; store its dense parts instead")
    if type(tensor) not in _PLAIN:
        raise ValueError(
            f"state {shown} is a `{type(tensor).__qualname__}`; store its local tensor, or save "
            "sharded state through torch.distributed.checkpoint"
        )
    if tensor.dtype not in _NAMES:
        raise ValueError(f"state {shown} has dtype {tensor.dtype}, which safetensors cannot hold")
    return TensorSource(
        shown, _NAMES[tensor.dtype], tuple(tensor.shape), lambda: (byte_view(tensor),)
    )


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order, on the host; a view where it already is that."""
    host = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    if host.numel() == 0:
        return memoryview(b"")
    return host.reshape(-1).view(torch.uint8).numpy().data


def wait_for_devices(values: Iterable[object]) -> None:
    """Until the current stream of each CUDA device that holds one of `values` is done."""
    for device in {v.device for v in values if isinstance(v, torch.Tensor) and v.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def identity(tensor: torch.Tensor) -> object:
    """Equal for two tensors that are the same view of the same memory (tied weights)."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.numel() == 0:
        return ("no memory to share", id(tensor))
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def empty(dtype: str, shape: Sequence[int]) -> tuple[torch.Tensor, memoryview]:
    """An uninitialised host tensor and a writable view of its bytes."""
    tensor = torch.empty(tuple(shape), dtype=TORCH_DTYPES[dtype])
    if tensor.numel() == 0:
        return tensor, memoryview(bytearray())
    return tensor, tensor.reshape(-1).view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype; ValueError when it has none."""
    if dtype not in _NAMES:
        raise ValueError(f"dtype {dtype} cannot be stored in safetensors")
    return _NAMES[dtype]


def named(tag: str, value: str) -> object:
    """The torch dtype or device of that name; ValueError otherwise."""
    if tag == "$torch_device":
        try:
            return torch.device(value)
        except RuntimeError:
            raise ValueError(f"{value[:40]!r} is not a torch device") from None
    found = getattr(torch, value, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{value[:40]!r} is not a torch dtype")
    return found
