"""What torch.compile made, kept beside the run, so that a resumed run compiles nothing again.

The compiler has a cache of its own on the machine's disk; this one travels with the run directory
to the next machine, and after a reboot. It holds the graphs and the kernels that inductor made for
a GPU, and (`kernel_files`) those that were written by hand; C++ made for a CPU is built again.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from matilda_train.kernel_files import KernelFiles
from matilda_train.whole_file import remove_abandoned, write_whole

if TYPE_CHECKING:
    from torch.compiler._cache import CacheInfo

__all__ = ["CompileCache"]

MOST_FILES = 4
"""Of torch's artifacts; the oldest go first."""

Artifacts = frozenset[tuple[str, str]]
"""Kind and key of each. A key is a hash of what the artifact was made of."""


class CompileCache:
    """Compiled artifacts in `folder` for this torch, Python and kind of device.

    Files of torch's, `NAME-DIGEST.bin`, and, for a GPU, an archive of kernels written by hand. Make
    it before the first kernel is used, `load` before the first compiled call. An entry is used only
    if the code it was made of is the same to the byte, so a stale file costs time, never
    correctness. Loading unpickles: a run directory from somebody else can run code, as its config
    cannot.

    Torch hands out only what this process compiled or came to use. One that is stopped while
    warming up has used little, so a save adds a file and removes only those it covers.
    """

    def __init__(
        self, folder: str | Path, device: torch.device, *, enabled: bool = True, writes: bool = True
    ) -> None:
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        parts = (torch.__version__, platform.python_version(), device.type, kind)
        self.name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        self.folder = Path(folder)
        self.enabled = enabled
        self._writes = writes
        self._kept: dict[Path, Artifacts] = {}
        self._kernels: KernelFiles | None = None
        if enabled and device.type == "cuda":
            self._kernels = KernelFiles(self.folder / f"{self.name}.kernels.zip")
            self._kernels.watch()

    def load(self) -> bool:
        """Give the compilers what earlier processes saved; whether any file of torch's was whole.

        Damaged files are passed over.
        """
        if not self.enabled:
            return False
        if self._kernels is not None:
            self._kernels.load()
        for file in self._files():
            try:
                content = file.read_bytes()
                digest, artifacts = content[:32], content[32:]
                if hashlib.sha256(artifacts).digest() != digest:
                    continue
                loaded = torch.compiler.load_cache_artifacts(artifacts)
            except OSError:  # removed by another process, or no room in the machine's cache
                continue
            if loaded is not None:
                self._kept[file] = _names(loaded)
        return bool(self._kept)

    def close(self) -> None:
        """Watch no kernel any more."""
        if self._kernels is not None:
            self._kernels.close()

    def account(self) -> dict[str, int]:
        """Graphs that this process took from a cache, `reused`, and those that it `compiled`.

        `traced` counts the functions whose backward pass was derived anew, before either, and
        `kernels` those made by other compilers (`kernel_files`).
        """
        from torch._dynamo.utils import counters

        inductor, autograd = counters["inductor"], counters["aot_autograd"]
        return {
            "traced": autograd["total"] - autograd["autograd_cache_hit"],
            "reused": inductor["fxgraph_cache_hit"],
            "compiled": inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"],
            "kernels": self._kernels.compiled() if self._kernels is not None else 0,
        }

    def save(self) -> bool:
        """Write what has been compiled or used since the process began, if any of it is new.

        A disk that takes no more costs the next process its head start, never this one its life.
        """
        if not (self.enabled and self._writes):
            return False
        try:
            remove_abandoned(self.folder)
            kernels = self._kernels is not None and self._kernels.save()
            return self._save_artifacts() or kernels
        except OSError:
            return False

    def _save_artifacts(self) -> bool:
        made = torch.compiler.save_cache_artifacts()
        if made is None:
            return False
        artifacts, used = made[0], _names(made[1])
        self._kept = {file: held for file, held in self._kept.items() if file.is_file()}
        if used <= frozenset().union(*self._kept.values()):
            return False
        digest = hashlib.sha256(artifacts).digest()
        written = self.folder / f"{self.name}-{digest.hex()[:16]}.bin"
        write_whole(written, digest + artifacts)
        for file, held in self._kept.items():
            if held <= used:
                file.unlink(missing_ok=True)
        self._kept[written] = used
        others = [file for file in self._files() if file != written]
        others.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        for file in others[MOST_FILES - 1 :]:
            file.unlink(missing_ok=True)
        return True

    def _files(self) -> list[Path]:
        return list(self.folder.glob(f"{self.name}*.bin"))  # `NAME.bin` is an earlier version's


def _names(info: CacheInfo) -> Artifacts:
    return frozenset((kind, key) for kind, keys in info.artifacts.items() for key in keys)
