"""Times one optimizer step of Muon against other implementations, in one process.

python benchmarks/muon.py                       # the hero's, the 350M and a 1B model's shapes
python benchmarks/muon.py --quick               # small shapes, under a minute on 2 CPU cores
python benchmarks/muon.py --peer-dir DIR        # also peers whose public checkouts lie in DIR:
                                                #   DIR/Muon (KellerJordan), DIR/nanochat, DIR/dion
python benchmarks/muon.py --json FILE           # all figures, with versions and settings

`pytorch_optimizer` is timed when it is installed. Every optimizer holds the same matrices and
random gradients; only `step()` is timed, with device events on a GPU. Launches are kernels that
the profiler counts in one step. Peak is memory above parameters, gradients and state.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines, read at torch's import

import torch
from torch import Tensor, nn

import matilda_optim

Shapes = list[tuple[int, int]]


def decoder(layers: int, d: int, kv: int, ff: int, gated: bool) -> Shapes:
    """The hidden matrices of a decoder: q, o, k, v, up, (gate,) down for each layer."""
    layer = [(d, d), (d, d), (kv, d), (kv, d), (ff, d), *([(ff, d)] if gated else []), (d, ff)]
    return layer * layers


MODELS: dict[str, Shapes] = {
    "hero 152M": decoder(18, 768, 256, 3072, gated=False),
    "350M": decoder(32, 960, 320, 2560, gated=True),
    "1B": decoder(16, 2048, 512, 8192, gated=True),
}
QUICK: dict[str, Shapes] = {"quick": decoder(2, 128, 64, 512, gated=False)}

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def ours(**options: Any) -> Build:
    return lambda params: matilda_optim.Muon(
        params, lr=1e-3, ns_coefficients="polar_express", **options
    )


def torch_muon(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(params, lr=1e-3)


def torch_adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, fused=params[0].is_cuda)


def pytorch_optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    module = importlib.import_module("pytorch_optimizer")
    groups = [{"params": params, "use_muon": True}]
    optimizer: torch.optim.Optimizer = module.Muon(groups, lr=1e-3)
    return optimizer


def keller(file: Path) -> Build:
    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        spec = importlib.util.spec_from_file_location("keller_muon", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        optimizer: torch.optim.Optimizer = module.SingleDeviceMuon(params, lr=1e-3)
        return optimizer

    return build


def nanochat(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    module = importlib.import_module("nanochat.optim")
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    options = {"lr": 1e-3, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.1}
    groups = [{"params": ps, "kind": "muon", **options} for ps in by_shape.values()]
    optimizer: torch.optim.Optimizer = module.MuonAdamW(groups)
    return optimizer


def dion(**options: Any) -> Build:
    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        module = importlib.import_module("dion")
        optimizer: torch.optim.Optimizer = module.Muon(
            params, lr=1e-3, nesterov=True, weight_decay=0.1, **options
        )
        return optimizer

    return build


def contenders(peer_dir: Path | None, cuda: bool) -> dict[str, Build]:
    """Name → constructor, ours first; peers that are not there are left out."""
    found: dict[str, Build] = {"matilda": ours()}
    if cuda:
        found["matilda, own graph"] = ours(graph=True)
    found["matilda, pure torch"] = ours(backend="reference")
    found["torch.optim.Muon"] = torch_muon
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        found["pytorch-optimizer"] = pytorch_optimizer
    if peer_dir is not None:
        if (peer_dir / "Muon" / "muon.py").exists():
            found["KellerJordan/Muon"] = keller(peer_dir / "Muon" / "muon.py")
        if (peer_dir / "nanochat" / "nanochat").is_dir() and cuda:
            sys.path.append(str(peer_dir / "nanochat"))
            found["nanochat (NorMuon)"] = nanochat
        if (peer_dir / "dion" / "dion").is_dir() and cuda:
            sys.path.append(str(peer_dir / "dion"))
            found["dion"] = dion()
            found["dion, Triton"] = dion(use_triton=True)
    found["AdamW, fused (for scale)" if cuda else "AdamW (for scale)"] = torch_adamw
    return found


def matrices(shapes: Shapes, device: str, dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters with gradients, seeded."""
    g = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=g, device=device).mul_(0.02).to(dtype))
        p.grad = torch.randn(shape, generator=g, device=device).mul_(1e-3).to(dtype)
        params.append(p)
    return params


def milliseconds(step: Callable[[], Any], cuda: bool, budget_s: float) -> list[float]:
    """Times of single steps, sorted: 3 to 50 after 4 to warm up, within a time budget."""
    for _ in range(4):
        step()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 3 or (time.perf_counter() - begin < budget_s and len(samples) < 50):
        if cuda:
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end))
        else:
            tick = time.perf_counter()
            step()
            samples.append((time.perf_counter() - tick) * 1e3)
    return sorted(samples)


def launches(step: Callable[[], Any], cuda: bool) -> int:
    """Kernels on the device, or operators on the CPU, in one step."""
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        step()
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        on_device = torch.autograd.DeviceType.CUDA
        return sum(1 for e in profile.events() if e.device_type == on_device)
    return sum(1 for e in profile.events() if e.name.startswith("aten::") and not e.cpu_children)


def measure(
    build: Build, shapes: Shapes, device: str, dtype: torch.dtype, budget_s: float
) -> dict[str, Any]:
    cuda = device == "cuda"
    params = matrices(shapes, device, dtype)
    optimizer = build(params)
    begin = time.perf_counter()
    optimizer.step()
    if cuda:
        torch.cuda.synchronize()
    first_s = time.perf_counter() - begin
    samples = milliseconds(optimizer.step, cuda, budget_s)
    row: dict[str, Any] = {
        "ms": statistics.median(samples),
        "ms_least": samples[0],
        "ms_most": samples[-1],
        "samples": len(samples),
        "first_step_s": first_s,
    }
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        held = [*params, *(p.grad for p in params if p.grad is not None), *state]
        own = sum(t.numel() * t.element_size() for t in held)
        optimizer.step()
        torch.cuda.synchronize()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - own) / 2**20
    row["launches"] = launches(optimizer.step, cuda)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--peer-dir", type=Path, help="folder of peers' public checkouts")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="all by default")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="those whose name contains one of these"
    )
    parser.add_argument("--budget-s", type=float, default=2.0, help="seconds for one figure")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    models = QUICK if args.quick else {m: MODELS[m] for m in args.models or MODELS}
    dtypes = ["float32"] if args.quick else args.dtypes
    torch._dynamo.config.recompile_limit = 64  # peers compile one graph per shape
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "device": name, "python": platform.python_version()}
    report: dict[str, Any] = {**versions, "threads": torch.get_num_threads(), "rows": []}
    print(f"{name}, torch {torch.__version__}")
    for model, shapes in models.items():
        total = sum(rows * cols for rows, cols in shapes)
        for dtype in dtypes:
            print(f"\n{model}: {len(shapes)} matrices, {total / 1e6:.1f}M parameters, {dtype}")
            print(
                f"  {'':26} {'ms':>9} {'least – most':>17} {'× ours':>8} {'launches':>9} "
                f"{'peak MiB':>9}"
            )
            ours_ms = None
            key = {"model": model, "dtype": dtype}
            for who, build in contenders(args.peer_dir, cuda).items():
                if args.only and not any(part in who for part in args.only):
                    continue
                try:
                    row = measure(build, shapes, device, getattr(torch, dtype), args.budget_s)
                except Exception as error:
                    last = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
                    print(f"  {who:26} failed: {last[:90]}")
                    report["rows"].append(
                        {"model": model, "dtype": dtype, "who": who, "error": last}
                    )
                    continue
                if who == "matilda":
                    ours_ms = row["ms"]
                ratio = f"{row['ms'] / ours_ms:8.2f}" if ours_ms else f"{'–':>8}"
                peak = f"{row['peak_mib']:9.0f}" if "peak_mib" in row else " " * 9
                print(
                    f"  {who:26} {row['ms']:9.3f} {row['ms_least']:8.2f} –{row['ms_most']:7.2f} "
                    f"{ratio} {row['launches']:9d} {peak}",
                    flush=True,
                )
                report["rows"].append({**key, "who": who, **row})
                if args.json:
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
                if cuda:
                    torch.cuda.empty_cache()
    if not report["rows"]:
        print(f"muon.py: no optimizer's name contains {args.only!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
