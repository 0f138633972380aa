"""One case of `step.py`: a training step built, compiled, and timed when it is its turn."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from step_peers import peer_step

ROOT = Path(__file__).resolve().parents[1]
Batches = Iterator[tuple[Any, Any]]
"""Inputs and targets [B, T], a micro-batch after another, without end."""


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

    @property
    def slug(self) -> str:
        """The name as files have it."""
        return "".join(ch if ch.isalnum() else "_" for ch in self.name)


def measure(case: Case, args: argparse.Namespace) -> int:
    """In a process of its own: say that the case is ready, wait for the word, time it, report.

    In `args.work`, by the case's slug: `.ready` is written here, `.go` by the parent, then `.json`.
    """
    started = time.monotonic()
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    shape = _shape(case, toy=not cuda)
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
    warm_up, timed = (1, 3) if args.quick else (3, args.steps)
    n_batches = accumulate * (1 + warm_up + timed) if args.data_dir else 1
    batches = _batches(args.data_dir, shape, batch, n_batches, device)
    first = _first_step(lambda: step(batches))
    to_first_step = time.monotonic() - started
    if cuda:
        torch.cuda.empty_cache()
    (args.work / f"{case.slug}.ready").touch()
    while not (args.work / f"{case.slug}.go").exists():
        time.sleep(0.05)

    for _ in range(warm_up):
        step(batches)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, last = _timed(lambda: step(batches), timed, cuda)
    times.sort()
    median = times[len(times) // 2]

    from matilda_model import flops_per_token
    from matilda_train.hardware import device_name, peak_flops

    peak = peak_flops(device)
    rate = accumulate * batch * seq_len / median
    row = {
        "device": device_name(device),
        "command": shlex.join(("python", "benchmarks/step.py", *args.typed)),
        "installed": _installed(),
        "torch": torch.__version__,
        "batch": batch,
        "seq_len": seq_len,
        "micro_batches": accumulate,
        "tokens": "text" if args.data_dir else "random",
        "warm_up": 1 + warm_up,
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
        row["kernels_ms"] = _kernels(lambda: step(batches))
    (args.work / f"{case.slug}.tmp").write_text(json.dumps(row))
    (args.work / f"{case.slug}.tmp").rename(args.work / f"{case.slug}.json")
    return 0


def _shape(case: Case, *, toy: bool) -> Any:
    from matilda_model import ModelConfig

    text = (ROOT / "configs" / f"{case.config}.json").read_text()
    shape = ModelConfig(**json.loads(text)["model"] | case.overrides)
    if toy:
        shape = replace(
            shape, vocab_size=1024, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=None,
            head_dim=32, max_seq_len=128,
        )  # fmt: skip
    return shape


def _batches(data_dir: Path | None, shape: Any, batch: int, n_batches: int, device: Any) -> Batches:
    """Inputs and targets [batch, T], on the device before the first is asked for; then in circles.

    Windows of a data set, or one batch of random tokens. The board's power, and so its clock,
    depends on what is multiplied: a batch that is learned by heart is not what a run computes.
    """
    import torch

    rows, seq_len = n_batches * batch, shape.max_seq_len
    if data_dir is None:
        ids = torch.randint(0, min(50257, shape.vocab_size), (rows, seq_len + 1))
    else:
        from matilda_data import BinStream

        windows = BinStream(data_dir, seq_len=seq_len, seed=0).take(rows)
        ids = torch.from_numpy(windows.astype("int64")) % shape.vocab_size  # a toy has fewer
    pairs = [
        (part[:, :-1].contiguous().to(device), part[:, 1:].contiguous().to(device))
        for part in ids.split(batch)
    ]
    return itertools.cycle(pairs)


def _first_step(step: Callable[[], Any]) -> float:
    """The first step compiles; when cases compile at once they may not all fit: wait and retry."""
    import torch

    from matilda_train.errors import is_out_of_memory

    for attempt in range(20):
        try:
            return float(step())
        except RuntimeError as error:
            if attempt == 19 or not is_out_of_memory(error):
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
) -> Callable[[Batches], Any]:
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

    def step(batches: Batches) -> Any:
        for _ in range(accumulate):
            loss = run(*next(batches)).loss / accumulate
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

        groups = param_groups(model, algorithm="muon", lr=0.004, adamw_lr=3e-3, weight_decay=0.01)
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
