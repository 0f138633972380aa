"""Kill or fail a real writer process at every system call it makes on the checkpoint directory.

Uses strace's fault injection (`-e inject=…`). A child of the torch-free `writer` saves two steps
and retires two; for each system call that touches the directory, and each occurrence of it, a
fresh child is killed there, or gets an error there, and the directory is judged.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matilda_ckpt
from matilda_ckpt.retention import Keep
from matilda_ckpt.torture import writer

CHANGING_CALLS = (
    "mkdir",
    "write",
    "sync_file_range",
    "fsync",
    "fallocate",
    "renameat2",
    "linkat",
    "unlink",
    "rmdir",
)
KILL = "SIGKILL"
SEEDED = 4
"""Checkpoints made before the child begins: enough for it to share unchanged tensors."""
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EINTR")
CALLS = (
    "openat",
    "mkdir",
    "write",
    "sync_file_range",
    "fsync",
    "fallocate",
    "rename",
    "renameat2",
    "ioctl",
    "linkat",
    "unlink",
    "rmdir",
    "ftruncate",
    "pwrite64",
    "pread64",
    "readv",
    "close",
    "flock",
    "statfs",
    "getdents64",
)
READ_ONLY_CALLS = frozenset({"openat", "close", "pread64", "readv", "getdents64", "statfs"})
"""Calls at which an injected error may harmlessly go unreported: it can hit a mere reading."""


@dataclass
class SyscallVerdict:
    """One fault at every occurrence of one system call."""

    fault: str
    call: str
    points: int = 0
    violations: list[str] = field(default_factory=list)


def why_not() -> str | None:
    """Why this machine cannot run the sweep, or None."""
    if sys.platform != "linux":
        return "strace exists on Linux only"
    if shutil.which("strace") is None:
        return "strace is not installed"
    probe = subprocess.run(["strace", "-qq", "true"], capture_output=True, check=False)
    return None if probe.returncode == 0 else "strace may not trace processes here"


def sweep(
    folder: Path,
    faults: Sequence[str] = (KILL, *ERRORS),
    *,
    calls: Sequence[str] = CALLS,
    every: int = 1,
) -> Iterator[SyscallVerdict]:
    """Verdict by verdict; `every` = n tries each n-th occurrence only."""
    seed = folder / "seed"
    store = writer.open_store(str(seed))
    for step in range(1, SEEDED + 1):
        store.save(writer.request(step))
        store.retire(Keep(last=2))
    store.release()
    root = folder / "checkpoints"
    paths, counts = _dry_run(folder, seed, root)
    for fault in faults:
        for call in calls:
            if call not in counts:
                continue
            verdict = SyscallVerdict(fault, call)
            for when in range(1, counts[call] + 1, every):
                verdict.points += 1
                problem = _one(folder, seed, root, paths, call, fault, when)
                if problem:
                    verdict.violations.append(f"{fault} at {call} number {when}: {problem}")
            yield verdict


def _dry_run(folder: Path, seed: Path, root: Path) -> tuple[list[str], dict[str, int]]:
    """Paths the writer touches, and how often each call touches one of them."""
    log = folder / "dry.log"
    done = _spawn(seed, root, ["-y", "-s", "0", "-e", "trace=" + ",".join(CALLS), "-o", str(log)])
    if done.returncode:
        raise RuntimeError(f"the writer fails without any fault: {done.stderr[-500:]}")
    found = set()
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        found |= set(re.findall(re.escape(str(root)) + r'[^"<>,) ]*', line))
    # With -s 0 strings are cut, except paths, which strace prints whole.
    paths = sorted(found)
    counts: dict[str, int] = {}
    done = _spawn(seed, root, [*_paths(paths), "-e", "trace=" + ",".join(CALLS), "-o", str(log)])
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.match(r"(?:\d+ +)?([a-z0-9_]+)\(", line)
        if match:
            counts[match[1]] = counts.get(match[1], 0) + 1
    return paths, counts


def _one(
    folder: Path, seed: Path, root: Path, paths: list[str], call: str, fault: str, when: int
) -> str | None:
    kind = "signal=SIGKILL" if fault == KILL else f"error={fault}"
    options = [*_paths(paths), "-e", f"trace={call}", "-e", f"inject={call}:{kind}:when={when}"]
    done = _spawn(seed, root, [*options, "-o", str(folder / "run.log")])
    lines = done.stdout.splitlines()
    acknowledged = max((int(x.split()[1]) for x in lines if x.startswith("ack ")), default=SEEDED)
    problem = writer.judge(str(root), acknowledged)
    if problem:
        return problem
    if fault == KILL:
        if done.returncode == 0:
            return "the child was not killed"
    else:
        noticed = any(x.startswith(("error ", "kept ")) for x in lines)
        if done.returncode:
            return f"the retry failed: {lines[-1] if lines else done.stderr[-300:]}"
        if not noticed and call not in READ_ONLY_CALLS and fault != "EINTR":
            return "the error was not reported"
    store = writer.open_store(str(root))
    store.save(writer.request(9))
    store.retire(Keep(last=2))
    store.release()
    leftovers = [name for name in os.listdir(root) if name.startswith(".")]  # noqa: PTH208
    if leftovers:
        return f"{leftovers[0]} is still there after the next save"
    return writer.judge(str(root), 9)


def _spawn(seed: Path, root: Path, options: list[str]) -> subprocess.CompletedProcess[str]:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(seed, root)
    source = str(Path(matilda_ckpt.__file__).parent.parent)
    command = [
        sys.executable,
        "-S",
        "-B",
        "-m",
        "matilda_ckpt.torture.writer",
        str(root),
        str(SEEDED + 1),
        str(SEEDED + 2),
    ]
    return subprocess.run(
        # Not --seccomp-bpf: with it, strace 6.1 does not deliver signals at system call entry.
        ["strace", "-qq", *options, *command],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )


def _paths(paths: list[str]) -> list[str]:
    return [option for path in paths for option in ("-P", path)]
