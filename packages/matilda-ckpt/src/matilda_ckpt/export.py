"""Plain weights out of a checkpoint: one safetensors file that any tool opens."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

from matilda_ckpt.fs import OsFs
from matilda_ckpt.reading import SHARDED, SHARDED_NAME, load_state
from matilda_ckpt.tensor_file import TensorSource, plan_tensor_file, write_tensor_file

if TYPE_CHECKING:
    import torch


def export(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, name: str = "model"
) -> int:
    """Write the tensors of one state name to the new file `out`; returns the bytes written.

    Every byte is verified on the way, tied tensors are written under each of their keys, and the
    file appears under its name only when it is complete and durable.

    Raises DamagedError when the checkpoint does not verify, ValueError when the name is missing
    or holds no tensor, FileExistsError when `out` exists, OSError naming `out` when it cannot be
    written.
    """
    from matilda_ckpt import torch_tensors

    sources: list[TensorSource] = []
    for key, value in _tensors(load_state(path, names=[name])[name], ""):
        found = torch_tensors.source(key, value)
        sources.append(TensorSource(key, found.dtype, found.shape, found.read))
    if not sources:
        sharded = f"; {SHARDED}" if name == SHARDED_NAME else ""
        raise ValueError(f"state {name!r} of `{path}` holds no tensor to export{sharded}")
    target = os.path.abspath(out)  # noqa: PTH100
    folder = os.path.dirname(target)  # noqa: PTH120
    temp = f"{target}.{secrets.token_hex(4)}.tmp"
    fs = OsFs()
    plan = plan_tensor_file(sources)
    file = None
    try:
        file = fs.create(temp, plan.size)
        write_tensor_file(file, plan)
        fs.rename_noreplace(temp, target)
    except BaseException as error:
        if file is not None:
            file.close()
        with contextlib.suppress(OSError):
            fs.unlink(temp)
        if isinstance(error, OSError):
            # The same kind of error, but of the file that was asked for.
            raise OSError(error.errno, error.strerror or str(error), target) from error
        raise
    fs.fsync_dir(folder)
    return plan.size


def _tensors(value: object, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield path or "value", value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}.{index}" if path else str(index))
