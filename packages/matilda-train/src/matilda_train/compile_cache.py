"""What torch.compile made, kept beside the run, so that a resumed run compiles nothing again.

The compiler has a cache of its own on the machine's disk; this one travels with the run directory
to the next machine, and after a reboot. It holds the graphs and the kernels that inductor made for
a GPU, and (`kernel_files`) those that were written by hand; C++ made for a CPU is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import torch

from matilda_train.kernel_files import KernelFiles

__all__ = ["CompileCache"]


class CompileCache:
    """Compiled artifacts in `folder` for this torch, Python and kind of device.

    A file of torch's and, for a GPU, an archive of kernels written by hand. Make it before the
    first kernel is used, `load` before the first compiled call. An entry is used only if the code
    it was made of is the same to the byte, so a stale file costs time, never correctness. Loading
    unpickles: a run directory from somebody else can run code, as its config cannot.
    """

    def __init__(
        self, folder: str | Path, device: torch.device, *, enabled: bool = True, writes: bool = True
    ) -> None:
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        parts = (torch.__version__, platform.python_version(), device.type, kind)
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        self.path = Path(folder) / f"{name}.bin"
        self.enabled = enabled
        self._writes = writes
        self._saved = b""
        self._kernels: KernelFiles | None = None
        if enabled and device.type == "cuda":
            self._kernels = KernelFiles(self.path.with_suffix(".kernels.zip"))
            self._kernels.watch()

    def load(self) -> bool:
        """Give the compilers what an earlier process saved; whether torch's part was whole.

        A damaged file is passed over.
        """
        if self._kernels is not None:
            self._kernels.load()
        if not (self.enabled and self.path.is_file()):
            return False
        content = self.path.read_bytes()
        digest, artifacts = content[:32], content[32:]
        if hashlib.sha256(artifacts).digest() != digest:
            return False
        self._saved = digest
        return torch.compiler.load_cache_artifacts(artifacts) is not None

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
        """Write what has been compiled or loaded since the process began, if that is new.

        A disk that takes no more costs the next process its head start, never this one its life.
        """
        if not (self.enabled and self._writes):
            return False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for abandoned in self.path.parent.glob("*.partial"):
                abandoned.unlink()
            kernels = self._kernels is not None and self._kernels.save()
            return self._save_artifacts() or kernels
        except OSError:
            return False

    def _save_artifacts(self) -> bool:
        made = torch.compiler.save_cache_artifacts()
        if made is None:
            return False
        digest = hashlib.sha256(made[0]).digest()
        if digest == self._saved:
            return False
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_bytes(digest + made[0])
            partial.replace(self.path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self._saved = digest
        return True
