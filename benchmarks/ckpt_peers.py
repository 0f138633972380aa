"""The checkpoint writers that `ckpt.py` and `ckpt_powercut.py` put beside matilda-ckpt.

Each saves one mapping of names to tensors plus a step, as its documentation shows, and loads it
into materialised host tensors. "Durable" ones make the same promise as we do: fsynced data and
names before they return. Their plain forms are what training scripts do.
"""

from __future__ import annotations

import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Tensors = Mapping[str, torch.Tensor]


def fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Peer(ABC):
    """One writer. `name` is its row; `durable` says what its return promises."""

    name = ""
    durable = False
    suffix = ""

    def path(self, folder: Path, step: int) -> Path:
        return folder / f"step-{step:08d}{self.suffix}"

    @abstractmethod
    def save(self, folder: Path, step: int, state: Tensors) -> None: ...

    @abstractmethod
    def load(self, folder: Path, step: int) -> dict[str, torch.Tensor]: ...

    def steps(self, folder: Path) -> list[int]:
        """Steps that this writer's own convention takes for checkpoints, newest first."""
        found = [p.name for p in folder.glob(f"step-????????{self.suffix}")]
        return sorted((int(name[5:13]) for name in found), reverse=True)

    def remove(self, folder: Path, step: int) -> None:
        path = self.path(folder, step)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def close(self) -> None:
        return


class TorchSave(Peer):
    name = "torch.save"
    suffix = ".pt"

    def save(self, folder: Path, step: int, state: Tensors) -> None:
        torch.save({"step": torch.tensor(step), **state}, self.path(folder, step))

    def load(self, folder: Path, step: int) -> dict[str, torch.Tensor]:
        return torch.load(self.path(folder, step), weights_only=True)


class TorchSaveRename(TorchSave):
    name = "torch.save + rename"

    def save(self, folder: Path, step: int, state: Tensors) -> None:
        temp = folder / "tmp"
        torch.save({"step": torch.tensor(step), **state}, temp)
        temp.replace(self.path(folder, step))


class TorchSaveFsyncRename(TorchSave):
    name = "torch.save + fsync + rename"

    def save(self, folder: Path, step: int, state: Tensors) -> None:
        temp = folder / "tmp"
        torch.save({"step": torch.tensor(step), **state}, temp)
        fsync_path(temp)
        temp.replace(self.path(folder, step))


class TorchSaveDurable(TorchSave):
    name = "torch.save, durable"
    durable = True

    def save(self, folder: Path, step: int, state: Tensors) -> None:
        temp = folder / "tmp"
        torch.save({"step": torch.tensor(step), **state}, temp)
        fsync_path(temp)
        temp.replace(self.path(folder, step))
        fsync_path(folder)


class Safetensors(Peer):
    name = "safetensors"
    suffix = ".safetensors"

    def save(self, folder: Path, step: int, state: Tensors) -> None:
        from safetensors.torch import save_file

        save_file({"step": torch.tensor(step), **state}, self.path(folder, step))

    def load(self, folder: Path, step: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        # Mapped pages are not loaded yet: the clone is what a model would copy.
        return {k: v.clone() for k, v in load_file(self.path(folder, step)).items()}


class SafetensorsDurable(Safetensors):
    name = "safetensors, durable"
    durable = True

    def save(self, folder: Path, step: int, state: Tensors) -> None:
        from safetensors.torch import save_file

        temp = folder / "tmp"
        save_file({"step": torch.tensor(step), **state}, temp)
        fsync_path(temp)
        temp.replace(self.path(folder, step))
        fsync_path(folder)


class Dcp(Peer):
    name = "DCP"

    def save(self, folder: Path, step: int, state: Tensors) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(self.path(folder, step))
        dcp.save({"step": torch.tensor(step), **state}, storage_writer=writer, no_dist=True)

    def load(self, folder: Path, step: int) -> dict[str, torch.Tensor]:
        import torch.distributed.checkpoint as dcp

        reader = dcp.FileSystemReader(self.path(folder, step))
        metadata: Any = reader.read_metadata()
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in metadata.state_dict_metadata.items()
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
        return state


class TorchCheckpointing(Peer):
    """https://pypi.org/project/torch-checkpointing, from `--peer-dir`."""

    name = "torch_checkpointing"

    def __init__(self) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        config = CheckpointManager.Config.with_sync_save()
        # 0.1.1 fails with EINVAL at the unaligned tail of a file that it opened with O_DIRECT.
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = config.build()

    def save(self, folder: Path, step: int, state: Tensors) -> None:
        self._manager.save(str(self.path(folder, step)), {"step": step, "state": dict(state)})

    def load(self, folder: Path, step: int) -> dict[str, torch.Tensor]:
        loaded = self._manager.load(str(self.path(folder, step)), {"step": None, "state": None})
        return {"step": torch.tensor(loaded["step"]), **loaded["state"]}

    def close(self) -> None:
        self._manager.close()


class Orbax(Peer):
    """https://pypi.org/project/orbax-checkpoint on host arrays, from `--peer-dir`."""

    name = "orbax"

    def __init__(self) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import orbax.checkpoint

        self._checkpointer = orbax.checkpoint.PyTreeCheckpointer()

    def save(self, folder: Path, step: int, state: Tensors) -> None:
        arrays = {key: value.cpu().numpy() for key, value in state.items()}
        self._checkpointer.save(self.path(folder, step), {"step": np.array(step), **arrays})

    def load(self, folder: Path, step: int) -> dict[str, torch.Tensor]:
        found = self._checkpointer.restore(self.path(folder, step))
        return {key: torch.from_numpy(np.array(value)) for key, value in found.items()}

    def close(self) -> None:
        self._checkpointer.close()


class Matilda(Peer):
    name = "matilda-ckpt"
    durable = True

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def _checkpointer(self, folder: Path) -> Any:
        from matilda_ckpt import Checkpointer, Keep

        if folder not in self._open:
            self._open[folder] = Checkpointer(folder, keep=Keep(last=1000))
        return self._open[folder]

    def save(self, folder: Path, step: int, state: Tensors) -> None:
        self._checkpointer(folder).save(step, {"state": {"step": torch.tensor(step), **state}})

    def load(self, folder: Path, step: int) -> dict[str, torch.Tensor]:
        from matilda_ckpt import load_state

        state = load_state(self.path(folder, step))["state"]
        assert isinstance(state, dict)
        return state

    def close(self) -> None:
        for checkpointer in self._open.values():
            checkpointer.close()
        self._open.clear()


PEERS: list[type[Peer]] = [
    TorchSave,
    TorchSaveRename,
    TorchSaveFsyncRename,
    TorchSaveDurable,
    Safetensors,
    SafetensorsDurable,
    Dcp,
    TorchCheckpointing,
    Orbax,
    Matilda,
]


def available(peer_dir: Path | None) -> tuple[list[type[Peer]], list[str]]:
    """Writers that can be imported here, and a line for each that cannot."""
    if peer_dir is not None:
        sys.path.insert(0, str(peer_dir))
    found, missing = [], []
    for kind in PEERS:
        try:
            kind().close()
        except ImportError as error:
            missing.append(f"{kind.name}: not installed ({error.name}); give `--peer-dir`")
        else:
            found.append(kind)
    return found, missing
