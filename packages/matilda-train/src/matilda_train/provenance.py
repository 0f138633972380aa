"""What a run was made of: code, lock file, environment and hardware."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from matilda_train.hardware import device_name

__all__ = ["collect_provenance", "package_version"]

PACKAGES = (
    "matilda-model",
    "matilda-optim",
    "matilda-data",
    "matilda-ckpt",
    "matilda-train",
    "torch",
    "numpy",
    "triton",
    "liger-kernel",
)


def collect_provenance(device: torch.device) -> dict[str, Any]:
    """Git commit and a hash of the uncommitted diff, lock-file hash, versions, and hardware.

    Values that cannot be had (no git, no lock file) are None, never guessed. Where the code is no
    checkout, as on a machine that it was copied to, `MATILDA_COMMIT` may name its commit.
    """
    source = Path(__file__).resolve().parent
    found = _git(source, "rev-parse", "--show-toplevel", "HEAD")
    root, commit = found.splitlines() if found else (None, None)
    diff = _git(source, "diff", "HEAD") if root else None
    lock = Path(root) / "uv.lock" if root else None
    return {
        "git_sha": commit or os.environ.get("MATILDA_COMMIT"),
        "git_diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest()
        if lock and lock.is_file()
        else None,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "device": device_name(device),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(cwd: Path, *args: str) -> str | None:
    """Output of a git command about the code itself; None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(cwd), *args],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            start_new_session=True,  # Ctrl-C is a request to us, not to git
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
