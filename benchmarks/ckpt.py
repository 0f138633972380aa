"""Checkpoint speed: matilda-ckpt beside torch.save, safetensors, DCP, orbax and others.

    python benchmarks/ckpt.py [--quick] [--device cpu|cuda] [--json FILE] [--peer-dir DIR]

The state is that of `configs/base_152m_v2.json` under Muon + AdamW: fp32 weights, momentum of the
2-D tensors, two Adam moments of the rest (1.4 GB; `--quick`: 60 MB). Reported: wall time of a save
(with what its return promises), of a load into materialised host tensors from the page cache, peak
extra host memory of a save, and, for saves in the background, the time that training loses: in
the call and in the wait before the optimizer's step (the stall), and in all, on the same cores.
Every figure is the median of `--repeats` after one warm-up, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ckpt_peers import Peer, available


def hero_state(device: str, quick: bool) -> dict[str, torch.Tensor]:
    """Tensors of the shapes of the hero run; random, because zeros would flatter the disk."""
    layers, width, vocab = (2, 384, 8192) if quick else (18, 768, 50304)
    generator = torch.Generator().manual_seed(0)
    weights = {"embed.weight": (vocab, width), "norm.weight": (width,)}
    for i in range(layers):
        block = {
            "attn.q": (width, width),
            "attn.k": (width // 3, width),
            "attn.v": (width // 3, width),
            "attn.o": (width, width),
            "attn.q_norm": (64,),
            "attn.k_norm": (64,),
            "mlp.up": (4 * width, width),
            "mlp.down": (width, 4 * width),
            "norm1": (width,),
            "norm2": (width,),
        }
        weights |= {f"blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    state = {}
    for name, shape in weights.items():
        state[f"model.{name}"] = torch.randn(shape, generator=generator)
        if len(shape) == 2 and not name.startswith("embed"):
            state[f"optim.{name}.momentum"] = torch.randn(shape, generator=generator)
        else:
            state[f"optim.{name}.exp_avg"] = torch.randn(shape, generator=generator)
            state[f"optim.{name}.exp_avg_sq"] = torch.rand(shape, generator=generator)
            state[f"optim.{name}.step"] = torch.tensor(7.0)
    return {name: tensor.to(device) for name, tensor in state.items()}


def summary(samples: list[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def show(s: dict[str, float], scale: float = 1.0) -> str:
    return f"{s['median'] * scale:8.3f} [{s['min'] * scale:.3f}–{s['max'] * scale:.3f}]"


def settle() -> None:
    """Let the disk finish what earlier measurements left to it."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    os.sync()


def peak_extra_bytes(call: Callable[[], None]) -> int | None:
    """Growth of the process's resident set during `call` at its highest, where Linux tells."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        call()
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(key)


def measure(
    kind: type[Peer], state: dict[str, torch.Tensor], folder: Path, repeats: int
) -> dict[str, Any]:
    """Save and load figures of one writer."""
    peer = kind()
    saves, loads, memory = [], [], None
    folder.mkdir()
    for i in range(repeats + 1):
        settle()
        begun = time.perf_counter()
        if i == 0:
            memory = peak_extra_bytes(lambda: peer.save(folder, 0, state))
        else:
            peer.save(folder, i, state)
        seconds = time.perf_counter() - begun
        if i:
            saves.append(seconds)
            peer.remove(folder, i - 1)
    peer.close()
    peer = kind()
    for i in range(repeats + 1):
        gc.collect()
        begun = time.perf_counter()
        loaded = peer.load(folder, repeats)
        seconds = time.perf_counter() - begun
        if i:
            loads.append(seconds)
        name = max(state, key=lambda key: state[key].numel())
        assert torch.equal(loaded[name].cpu(), state[name].cpu()), f"{kind.name} loads other values"
        del loaded
    peer.close()
    shutil.rmtree(folder)
    return {
        "writer": kind.name,
        "durable": kind.durable,
        "save_s": summary(saves),
        "load_s": summary(loads),
        "peak_extra_host_bytes": memory,
    }


class Work:
    """Something to train on: matrix products that take about `step_s` on this device."""

    def __init__(self, device: str, step_s: float) -> None:
        size = 4096 if device == "cuda" else 512
        self._device = device
        self._a = torch.randn(size, size, device=device)
        self._count = 1
        self.step()
        begun = time.perf_counter()
        self.step(20)
        self._count = max(1, round(step_s / ((time.perf_counter() - begun) / 20)))

    def step(self, count: int | None = None) -> None:
        b = self._a
        for _ in range(count or self._count):
            b = (self._a @ b).clamp_(-1, 1)
        if self._device == "cuda":
            torch.cuda.synchronize()


Pending = tuple[Callable[[], None], Callable[[], object]]
"""Of a save that was begun: wait until training may change its state; wait until it is durable."""


def background(
    name: str,
    begin: Callable[[int], Pending],
    state: dict[str, torch.Tensor],
    repeats: int,
    step_s: float,
) -> dict[str, Any]:
    """Time that training loses to one background save, over steps of about `step_s` seconds.

    `stall` is the call and the wait before the state may change, which comes after the forward
    and backward pass; `lost` is all that the call and four steps take beyond four steps alone.
    """
    device = next(iter(state.values())).device.type
    work = Work(device, step_s)
    weight = max(state.values(), key=torch.Tensor.numel)
    calls, stalls, lost, first = [], [], [], 0.0
    for i in range(repeats + 1):
        settle()
        plain = [_timed(work.step) for _ in range(4)]
        begun = time.perf_counter()
        may_change, finish = begin(i)
        call = time.perf_counter() - begun
        work.step()
        wait = _timed(may_change)
        weight.mul_(1.0)  # training goes on to change what was saved
        for _ in plain[1:]:
            work.step()
        whole = time.perf_counter() - begun
        finish()
        if i == 0:
            first = call + wait
            continue
        calls.append(call)
        stalls.append(call + wait)
        lost.append(whole - sum(plain))
    return {
        "writer": name,
        "call_s": summary(calls),
        "stall_s": summary(stalls),
        "lost_s": summary(lost),
        "first_stall_s": first,
        "step_s": step_s,
    }


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def matilda_background(folder: Path, state: dict[str, torch.Tensor]) -> Callable[[int], Pending]:
    return _matilda(folder, state, defer=False)


def matilda_deferred(folder: Path, state: dict[str, torch.Tensor]) -> Callable[[int], Pending]:
    return _matilda(folder, state, defer=True)


def _matilda(folder: Path, state: dict[str, torch.Tensor], defer: bool) -> Callable[[int], Pending]:
    from matilda_ckpt import Checkpointer, Keep

    checkpoints = Checkpointer(folder, keep=Keep(last=2))
    checkpoints.reserve({"state": state})

    def begin(step: int) -> Pending:
        handle = checkpoints.save(step, {"state": state}, wait=False, defer_copy=defer)
        return handle.wait_copied, handle.result

    return begin


def dcp_background(folder: Path, state: dict[str, torch.Tensor]) -> Callable[[int], Pending]:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("cpu:gloo", store=store, rank=0, world_size=1)

    def begin(step: int) -> Pending:
        writer = dcp.FileSystemWriter(folder / f"dcp-{step}")
        future = dcp.async_save(dict(state), storage_writer=writer)

        def finish() -> None:
            future.result()
            shutil.rmtree(folder / f"dcp-{step}")

        return lambda: None, finish

    return begin


def hash_rate() -> float:
    """GB/s of SHA-256 on one core."""
    data = os.urandom(64 << 20)
    hashlib.sha256(data).digest()
    return len(data) / min(_timed(lambda: hashlib.sha256(data).digest()) for _ in range(3)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small state, under a minute")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where the state lives")
    parser.add_argument("--repeats", type=int, help="timed saves (default: 5, quick: 2)")
    parser.add_argument("--step-s", type=float, help="seconds of a pretended training step")
    parser.add_argument("--only", nargs="*", help="names of writers")
    parser.add_argument(
        "--dir", type=Path, help="where to write (default: the temporary directory)"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--peer-dir", type=Path, help="directory with importable peers")
    options = parser.parse_args()
    repeats = options.repeats or (2 if options.quick else 5)
    step_s = options.step_s or (0.2 if options.quick else 3.0)
    warnings.simplefilter("ignore")
    state = hero_state(options.device, options.quick)
    nbytes = sum(tensor.nbytes for tensor in state.values())
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "state_bytes": nbytes,
        "tensors": len(state),
        "repeats": repeats,
        "warm_up": 1,
        "sha256_gb_per_s_per_core": round(hash_rate(), 2),
    }
    print(json.dumps(environment))
    kinds, missing = available(options.peer_dir)
    rows, late = [], []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        print(f"{'writer':28} {'promise':8} {'save s':>28} {'load s':>28} {'peak MB':>8}")
        for kind in kinds:
            if options.only and kind.name not in options.only:
                continue
            row = measure(kind, state, Path(folder) / "work", repeats)
            rows.append(row)
            peak = row["peak_extra_host_bytes"]
            print(
                f"{kind.name:28} {'durable' if kind.durable else '–':8} {show(row['save_s']):>28} "
                f"{show(row['load_s']):>28} {'–' if peak is None else f'{peak / 1e6:8.0f}'}",
                flush=True,
            )
        print(
            f"\n{'in the background':28} {'call ms':>28} {'stall ms':>28} "
            f"{'training loses ms':>28} {'first ms':>9}"
        )
        makers = {
            "matilda-ckpt": matilda_background,
            "matilda-ckpt, deferred": matilda_deferred,
            "DCP async_save": dcp_background,
        }
        for name, make in makers.items():
            if options.only and name not in options.only:
                continue
            place = Path(folder) / "late"
            place.mkdir()
            row = background(name, make(place, state), state, repeats, step_s)
            late.append(row)
            print(
                f"{name:28} {show(row['call_s'], 1e3):>28} {show(row['stall_s'], 1e3):>28} "
                f"{show(row['lost_s'], 1e3):>28} {row['first_stall_s'] * 1e3:9.1f}",
                flush=True,
            )
            shutil.rmtree(place)
    for line in missing:
        print(line)
    if options.json:
        result = {"environment": environment, "save_load": rows, "background": late}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
