"""Tokens per second of a whole training step, per config and back end, beside its peers.

    python benchmarks/step.py [--quick] [--json FILE] [--peer-dir DIR] [--cases PATTERN]

A step is forward, backward, gradient clipping and the optimizer on random tokens, compiled, bf16:
on one micro-batch, or with `--tokens-per-step` on as many as make that many tokens, as a run does
(peers as well). Each case runs in its own process, so that none inherits another's compiler
state or memory: all compile at once, then each is timed alone, median of `--steps` steps by device
events. On a machine without CUDA the cases shrink to toy shapes, eager, in float32.

`--peer-dir` holds public checkouts: `nanoGPT/model.py`, `nanochat/nanochat/gpt.py`; transformers
is used when it can be imported. Peers run at the hero's shape and their MFU counts the hero's
FLOPs, so that the column orders them as tokens per second do.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from step_peers import peer_step
from step_table import show

ROOT = Path(__file__).resolve().parents[1]

PEAK_BF16_FLOPS = {  # dense, per device, by the exact name the driver reports
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}


@dataclass(frozen=True)
class Case:
    name: str
    config: str
    """Stem of a file in configs/; a peer runs at that shape."""
    batch: int
    """Sequences in a micro-batch."""
    overrides: dict[str, str] = field(default_factory=dict)
    optimizer: str = "muon"
    peer: str | None = None


# "hero" and its kin are left to `auto`; every other case names one back end instead.
CASES = [
    Case("hero", "base_152m_v2", 64),
    Case("hero loss=fused_fp8", "base_152m_v2", 64, {"loss": "fused_fp8"}),
    Case("hero adamw", "base_152m_v2", 64, optimizer="adamw"),
    Case("hero attention=cudnn", "base_152m_v2", 64, {"attention": "cudnn"}),
    Case("hero matmul=quack", "base_152m_v2", 64, {"matmul": "quack"}),
    Case("hero matmul=fused", "base_152m_v2", 64, {"matmul": "fused"}),
    Case("hero cudnn fused", "base_152m_v2", 64, {"attention": "cudnn", "matmul": "fused"}),
    Case("hero attention=flash", "base_152m_v2", 32, {"attention": "flash"}),
    Case("hero attention=flex", "base_152m_v2", 32, {"attention": "flex"}),
    Case("hero loss=plain", "base_152m_v2", 16, {"loss": "plain"}),
    Case("hero loss=chunked", "base_152m_v2", 32, {"loss": "chunked"}),
    Case("hero loss=liger", "base_152m_v2", 32, {"loss": "liger"}),
    Case("hero matmul=plain", "base_152m_v2", 32, {"matmul": "plain"}),
    Case("hero norm=plain", "base_152m_v2", 32, {"norm": "plain"}),
    Case("v1", "base_124m", 64, optimizer="adamw"),
    Case("350m", "base_350m", 16),
    Case("nanoGPT", "base_152m_v2", 32, optimizer="its own", peer="nanoGPT"),
    Case("nanochat", "base_152m_v2", 32, optimizer="its own", peer="nanochat"),
    Case("transformers Qwen3", "base_152m_v2", 16, optimizer="adamw", peer="transformers"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps; under a minute on 2 cores")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--peer-dir", type=Path, help="folder of public peer checkouts")
    parser.add_argument("--cases", default="*", help="shell patterns of case names, by comma")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a case")
    parser.add_argument("--batch", type=int, help="sequences in a micro-batch, for every case")
    parser.add_argument(
        "--tokens-per-step", type=int, default=0, help="accumulate up to so many (default: no)"
    )
    parser.add_argument("--blocks", action="store_true", help="compile each block by itself")
    parser.add_argument("--jobs", type=int, default=8, help="cases that compile at once")
    parser.add_argument("--limit", type=float, default=1e9, help="stop starting cases after s")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table there")
    parser.add_argument("--table", type=Path, help="print this --json FILE again, run nothing")
    parser.add_argument("--profile", action="store_true", help="add each case's kernel times")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parent", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.typed = json.loads(args.parent) if args.parent else sys.argv[1:]
    if args.table:
        show(json.loads(args.table.read_text()), args.write)
        return 0
    patterns = args.cases.split(",")
    cases = [c for c in CASES if any(fnmatch.fnmatch(c.name, p) for p in patterns)]
    if args.batch:
        cases = [replace(case, batch=args.batch) for case in cases]
    if args.child:
        case = next(case for case in cases if case.name == args.child)
        return _child(case, args)
    cases = [case for case in cases if _available(case, args)]
    import torch

    if not torch.cuda.is_available():
        args.jobs = 1
    if args.quick:
        cases = [case for case in cases if case.name in ("hero", "v1", "nanoGPT", "nanochat")]
    if not cases:
        print(f"step.py: no case matches {args.cases!r} on this machine", file=sys.stderr)
        return 2
    rows = _run(cases, args)
    crowded = [row["name"] for row in rows if "OutOfMemory" in row.get("error", "")]
    if crowded and args.jobs > 1:  # once more, with the device to itself
        args.jobs = 1
        again = _run([case for case in cases if case.name in crowded], args)
        rows = [row for row in rows if row["name"] not in crowded] + again
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows, args.write)
    return 0 if all("error" not in row for row in rows) else 1


def _available(case: Case, args: argparse.Namespace) -> bool:
    if case.peer in ("nanoGPT", "nanochat"):
        return args.peer_dir is not None and (args.peer_dir / case.peer).is_dir()
    needs = {
        "fa4": "flash_attn.cute",
        "liger": "liger_kernel",
        "quack": "quack",
        "quack_residual": "quack",
        "transformers": "transformers",
    }
    for value in (*case.overrides.values(), case.peer):
        if value in needs:
            with contextlib.suppress(ImportError):
                if importlib.util.find_spec(needs[value]) is not None:
                    continue
            return False
    import torch

    return torch.cuda.is_available() or not case.overrides


def _run(cases: list[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All children at once up to `--jobs`; each waits, compiled, for its turn to be timed."""
    start = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        queue = list(cases)
        running: dict[str, tuple[Case, subprocess.Popen[bytes]]] = {}
        while queue or running:
            while queue and len(running) < args.jobs and time.monotonic() - start < args.limit:
                case = queue.pop(0)
                running[case.name] = (case, _spawn(case, args, work))
            if not running:
                break
            if any(not _ready(work, n) and p.poll() is None for n, (_, p) in running.items()):
                time.sleep(0.1)  # time nothing while another case still compiles
                continue
            for name in list(running):
                case, process = running.pop(name)
                (work / f"{_slug(name)}.go").touch()
                process.wait()
                result = work / f"{_slug(name)}.json"
                row = {"name": name, "batch": case.batch, "optimizer": case.optimizer}
                if result.exists():
                    row |= json.loads(result.read_text())
                else:
                    errors = (work / f"{_slug(name)}.err").read_text(errors="replace")
                    row["error"] = (
                        " / ".join(errors.strip().splitlines()[-3:])[-600:] or "no output"
                    )
                rows.append(row)
                if args.json:  # after every case: an interrupted run keeps what it measured
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")
                print(f"# {name}: {row.get('tokens_per_s', row.get('error'))}", file=sys.stderr)
    return rows


def _spawn(case: Case, args: argparse.Namespace, work: Path) -> subprocess.Popen[bytes]:
    import torch

    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TORCHDYNAMO_DISABLE"] = "1"  # a peer compiles its optimizer even on a CPU
    command = [sys.executable, __file__, "--child", case.name, "--work", str(work)]
    command += ["--steps", str(args.steps), "--batch", str(case.batch)]
    command += ["--tokens-per-step", str(args.tokens_per_step)]
    command += ["--quick"] * args.quick + ["--profile"] * args.profile
    command += ["--blocks"] * args.blocks
    command += ["--parent", json.dumps(args.typed)]
    if args.peer_dir is not None:
        command += ["--peer-dir", str(args.peer_dir.resolve())]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=(work / f"{_slug(case.name)}.err").open("w"),
        env=environment,
    )


def _slug(name: str) -> str:
    return "".join(ch if ch.isalnum() else "_" for ch in name)


def _ready(work: Path, name: str) -> bool:
    return (work / f"{_slug(name)}.ready").exists()


def _child(case: Case, args: argparse.Namespace) -> int:
    started = time.monotonic()
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    shape = _shape(case, quick=args.quick and not cuda)
    batch = case.batch if cuda else 2
    seq_len = shape.max_seq_len
    accumulate = max(1, args.tokens_per_step // (batch * seq_len))
    with device:
        if case.peer is None:
            step = _matilda(case, shape, args, accumulate)
        else:
            folder = args.peer_dir or Path()
            adamw = partial(_optimizer, kind="adamw", cuda=True)
            step = peer_step(case.peer, shape, folder, accumulate, adamw)
    ids = torch.randint(0, min(50257, shape.vocab_size), (batch, seq_len + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    first = _first_step(lambda: step(inputs, targets))
    to_first_step = time.monotonic() - started
    if cuda:
        torch.cuda.empty_cache()
    slug = _slug(case.name)
    (args.work / f"{slug}.ready").touch()
    while not (args.work / f"{slug}.go").exists():
        time.sleep(0.05)

    for _ in range(1 if args.quick else 5):
        step(inputs, targets)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, last = _timed(lambda: step(inputs, targets), 3 if args.quick else args.steps, cuda)
    times.sort()
    median = times[len(times) // 2]

    from matilda_model import flops_per_token

    name = torch.cuda.get_device_name() if cuda else "cpu"
    peak = PEAK_BF16_FLOPS.get(name)
    rate = accumulate * batch * seq_len / median
    row = {
        "device": name,
        "command": " ".join(("python benchmarks/step.py", *args.typed)),
        "installed": _installed(),
        "torch": torch.__version__,
        "batch": batch,
        "seq_len": seq_len,
        "micro_batches": accumulate,
        "steps": len(times),
        "tokens_per_s": rate,
        "mfu_palm": peak and rate * flops_per_token(shape, seq_len, causal=False) / peak,
        "mfu_causal": peak and rate * flops_per_token(shape, seq_len, causal=True) / peak,
        "step_ms": 1e3 * median,
        "step_ms_min": 1e3 * times[0],
        "step_ms_max": 1e3 * times[-1],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "to_first_step_s": to_first_step,
        "first_loss": first,
        "last_loss": last,
        "overrides": case.overrides,
        "model": asdict(shape),
    }
    if args.profile and cuda:
        row["kernels_ms"] = _kernels(lambda: step(inputs, targets))
    (args.work / f"{slug}.tmp").write_text(json.dumps(row))
    (args.work / f"{slug}.tmp").rename(args.work / f"{slug}.json")
    return 0


def _shape(case: Case, *, quick: bool) -> Any:
    from matilda_model import ModelConfig

    text = (ROOT / "configs" / f"{case.config}.json").read_text()
    shape = ModelConfig(**json.loads(text)["model"] | case.overrides)
    if quick:
        shape = replace(
            shape, vocab_size=1024, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=None,
            head_dim=32, max_seq_len=128,
        )  # fmt: skip
    return shape


def _first_step(step: Callable[[], Any]) -> float:
    """The first step compiles; when cases compile at once they may not all fit: wait and retry."""
    import torch

    for attempt in range(20):
        try:
            return float(step())
        except torch.OutOfMemoryError:
            if attempt == 19:
                raise
        gc.collect()  # the failed step's frames hold its tensors
        torch.cuda.empty_cache()
        time.sleep(1.0 + os.getpid() % 7)
    raise AssertionError


def _timed(step: Callable[[], Any], steps: int, cuda: bool) -> tuple[list[float], float]:
    import torch

    if not cuda:
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            loss = step()
            times.append(time.perf_counter() - start)
        return times, float(loss)
    make: Any = torch.cuda.Event
    events = [make(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        loss = step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)], float(loss)


def _kernels(step: Callable[[], Any]) -> list[tuple[float, int, str]]:
    import torch
    from torch.profiler import profile

    with profile() as trace:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    rows = [
        (round(e.self_device_time_total / 3e3, 3), e.count // 3, e.key[:90])
        for e in trace.key_averages()
        if e.device_type.name == "CUDA" and "#" not in e.key
    ]
    return sorted(rows, reverse=True)[:40]


def _matilda(
    case: Case, shape: Any, args: argparse.Namespace, accumulate: int
) -> Callable[[Any, Any], Any]:
    import torch

    from matilda_model import Transformer

    cuda = torch.cuda.is_available()
    model = Transformer(shape)
    optimizer = _optimizer(model, case.optimizer, cuda)
    run: Any = model
    if cuda:
        model.compute_dtype = torch.bfloat16
        if args.blocks:
            for block in model.blocks:
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        else:
            run = torch.compile(model, fullgraph=shape.loss != "liger", dynamic=False)

    def step(inputs: Any, targets: Any) -> Any:
        for _ in range(accumulate):
            loss = run(inputs, targets).loss / accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach() * accumulate

    return step


def _optimizer(model: Any, kind: str, cuda: bool) -> Any:
    import torch

    if kind == "muon":
        from matilda_optim import Muon, param_groups

        groups = param_groups(model, algorithm="muon", lr=0.02, adamw_lr=3e-3, weight_decay=0.01)
        return Muon(groups, graph=cuda)
    return torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=cuda)


def _installed() -> dict[str, str]:
    """Versions of what the choices depend on; a missing one is not named."""
    from importlib import metadata

    found = {}
    for name in (
        "torch", "triton", "flash-attn-4", "quack-kernels", "liger-kernel", "transformers"
    ):  # fmt: skip
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


if __name__ == "__main__":
    sys.exit(main())
