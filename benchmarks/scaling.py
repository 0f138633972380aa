"""One node of several GPUs: speed by number and strategy, resume on other numbers, a killed rank.

    python benchmarks/scaling.py --data-dir DIR --work-dir DIR [--gpus 8] [--json FILE]
    python benchmarks/scaling.py --quick         # toy shapes, two CPU processes, a minute or two

Every case is `torchrun apps/train.py` on real shards at one global batch. Speed is the median of
the logged steps after the first 8; cases that fit on the node together run at the same time, on
GPUs of their own. The first rank's last steps on one GPU and on all are traced, and divided into
arithmetic, exchange that nothing hides, and idle time. Then one run loses a rank to SIGKILL under
`--max-restarts`, is stopped by SIGTERM, continued on half of the GPUs, stopped, and continued on
all; it must see the batches of the undisturbed run, by hash, and its losses may differ from that
run's no more than those of another undisturbed run do (in which Muon's work is shared out).
`--table FILE` prints the figures of an earlier `--json FILE` as Markdown.
Needs CUDA; `--cpu` tries everything with gloo on small processes, `--quick` DDP and
the disturbed run on two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from time_to_loss import quick_data

from matilda_train.metrics_log import read_rows

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 8
TRACED_STEPS = 6
QUICK = [
    *("model.vocab_size=320", "model.d_model=64", "model.n_layers=2", "model.n_heads=2"),
    *("model.n_kv_heads=1", "model.head_dim=32", "model.max_seq_len=64", "data.tokenizer=byte"),
    *("train.tokens_per_step=1024", "train.micro_batch_size=8", "train.device=cpu"),
    *("train.compile=false", "train.threads=1", "eval.tokens=4096"),
]


@dataclass(frozen=True)
class Case:
    """One launch; `gpus` processes."""

    name: str
    gpus: int
    parallel: str = "ddp"
    distribute: str = "none"
    profile: bool = False

    @property
    def settings(self) -> list[str]:
        return [f"train.parallel={self.parallel}", f"optim.distribute={self.distribute}"]


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            args.cpu, args.gpus, args.set = True, 2, [*QUICK, *args.set]
            args.data_dir = args.data_dir or quick_data(Path(folder))
            args.work_dir = args.work_dir or Path(folder) / "work"
        measure(args)


def measure(args: argparse.Namespace) -> None:
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if args.data_dir is None or args.work_dir is None:
        raise SystemExit("error: give --data-dir and --work-dir, or --table FILE")
    if args.profile_worker:
        profile_worker(args)
        return
    args.work_dir.mkdir(parents=True, exist_ok=True)
    node = Node(args)
    full, half = args.gpus, args.gpus // 2
    smaller = [2**i for i in range(10) if 2**i < full]
    cases = [
        *(Case(f"{n} ddp" if n > 1 else "1", n, profile=n == 1) for n in smaller),
        *(Case(f"{n} ddp, shared Muon", n, "ddp", "ddp") for n in smaller if n > 1),
        *(Case(f"{n} fsdp", n, "fsdp") for n in smaller if n > 1),
        plain := Case(f"{full} ddp", full, profile=True),
        shared := Case(f"{full} ddp, shared Muon", full, "ddp", "ddp"),
        Case(f"{full} fsdp", full, "fsdp"),
    ]
    if args.quick:
        cases = cases[: cases.index(shared)]
    results: dict[str, Any] = {"environment": environment(args), "speed": []}

    def report(title: str, row: dict[str, Any]) -> None:
        print(f"{title}: {json.dumps(row)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))

    for wave in waves(cases, full):
        began = time.monotonic()
        running = [(case, *node.launch(case)) for case in wave]
        for case, run_dir, process in running:
            code = process.wait()
            row = asdict(case) | ({"exit": code} if code else speed_of(run_dir))
            results["speed"].append(row)
            report(f"{time.monotonic() - began:.0f} s", row)
    twin = node.run_dir(plain)
    if shared in cases:
        results["two undisturbed runs"] = differences(twin, node.run_dir(shared))
        report("two undisturbed runs", results["two undisturbed runs"])

    disturbed = node.work_dir / "disturbed"
    results["disturbed"] = node.disturb(disturbed, full, half)
    results["disturbed"] |= differences(twin, disturbed) | {"events": events_of(disturbed)}
    report("disturbed", results["disturbed"])
    wrong = [row["name"] for row in results["speed"] if row.get("exit")]
    same = ("all_steps", "equal_batches")
    if results["disturbed"]["exit"] or not all(results["disturbed"][name] for name in same):
        wrong.append("disturbed")
    if wrong:
        raise SystemExit(f"error: {', '.join(wrong)} failed; their logs are in `--work-dir`")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, default=ROOT / "configs/base_152m_v2.json", help="of every run"
    )
    parser.add_argument("--data-dir", type=Path, help="prepared data set")
    parser.add_argument("--work-dir", type=Path, help="run directories go here")
    parser.add_argument(
        "--gpus", type=int, default=max(torch.cuda.device_count(), 1), help="most to use (all)"
    )
    parser.add_argument("--steps", type=int, default=60, help="steps on all GPUs (60)")
    parser.add_argument("--set", nargs="+", default=[], help="settings of every run")
    parser.add_argument("--cpu", action="store_true", help="processes instead of GPUs")
    parser.add_argument("--quick", action="store_true", help="toy shapes on two CPU processes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--table", type=Path, help="print this result as Markdown, run nothing")
    parser.add_argument("--profile-worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def waves(cases: Sequence[Case], gpus: int) -> Iterable[list[Case]]:
    """Cases side by side, as many as the node has room for; largest first within a wave."""
    left = sorted(cases, key=lambda case: case.gpus)
    while left:
        wave: list[Case] = []
        for case in sorted(left, key=lambda case: -case.gpus):
            if sum(c.gpus for c in wave) + case.gpus <= gpus:
                wave.append(case)
        left = [case for case in left if case not in wave]
        yield wave


class Node:
    """Starts runs on this machine's GPUs, each free one given to one run at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work_dir: Path = args.work_dir
        self._next_gpu = 0

    def run_dir(self, case: Case) -> Path:
        return self.work_dir / case.name.replace(",", "").replace(" ", "-")

    def launch(
        self,
        case: Case,
        run_dir: Path | None = None,
        *,
        restarts: int = 0,
        extra: Sequence[str] = (),
    ) -> tuple[Path, subprocess.Popen[bytes]]:
        """Start torchrun; a case with fewer GPUs than the node takes the next free ones."""
        args, run_dir = self.args, run_dir or self.run_dir(case)
        first = self._next_gpu if self._next_gpu + case.gpus <= args.gpus else 0
        self._next_gpu = (first + case.gpus) % args.gpus
        # on fewer GPUs a step takes longer
        whole = case.gpus == args.gpus or run_dir.name == "disturbed"
        steps = args.steps if whole else max(28, 6 * case.gpus)
        program = [__file__, "--profile-worker"] if case.profile else [str(ROOT / "apps/train.py")]
        program += ["--work-dir" if case.profile else "--run-dir", str(run_dir)]
        every = 10 if run_dir.name == "disturbed" else 1_000_000
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(case.gpus), "--max-restarts", str(restarts), *program),
            *("--config", str(args.config), "--data-dir", str(args.data_dir), "--set"),
            *(f"train.total_steps={steps}", "optim.warmup_steps=5", "optim.schedule=constant"),
            *("log.every_steps=1", f"ckpt.every_steps={every}", "eval.every_steps=100000"),
            *("eval.tokens=262144", "eval.sample_tokens=0", *case.settings, *args.set, *extra),
        ]
        visible = ",".join(str(i) for i in range(first, first + case.gpus))
        log = (self.work_dir / f"{run_dir.name}.log").open("ab")
        environment = os.environ | {"OMP_NUM_THREADS": "4"}
        if not args.cpu:
            environment["CUDA_VISIBLE_DEVICES"] = visible
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        log.close()
        return run_dir, process

    def disturb(self, run_dir: Path, full: int, half: int) -> dict[str, Any]:
        """Kill a rank, stop, go on with half of the GPUs, stop, go on with all of them."""
        began = time.monotonic()
        _, process = self.launch(Case("disturbed", full), run_dir, restarts=3)
        wait_for_step(run_dir, 14, process)
        os.kill(worker_of_rank(full - 1, process.pid), signal.SIGKILL)
        killed = time.monotonic()
        while process.poll() is None and not any(
            e.startswith("resume") for e in events_of(run_dir)
        ):
            time.sleep(0.02)
        wait_for_step(run_dir, 14, process)
        back = time.monotonic() - killed
        wait_for_step(run_dir, 25, process)
        process.send_signal(signal.SIGTERM)
        process.wait()
        _, process = self.launch(Case("disturbed", half), run_dir)
        wait_for_step(run_dir, 35, process)
        process.send_signal(signal.SIGTERM)
        process.wait()
        _, process = self.launch(Case("disturbed", full), run_dir)
        code, wall = process.wait(), time.monotonic() - began
        rows = [row for row in read_rows(run_dir / "metrics.jsonl") if "step_ms" in row]
        return {
            "exit": code,
            "seconds": wall,
            "seconds from the kill to the next new step": back,
            "goodput": sum(row["step_ms"] for row in rows) / 1e3 / wall,
        }


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    ended = False
    while not ended:
        ended = process.poll() is not None  # before the look: its last rows count
        path = run_dir / "metrics.jsonl"
        if path.exists() and any(row["step"] >= step for row in read_rows(path)):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{run_dir.name} ended before step {step}, exit code {process.returncode}")


def worker_of_rank(rank: int, agent: int) -> int:
    """Process id of the worker that the torchrun process `agent` started as `rank`."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == agent and f"RANK={rank}".encode() in variables:
                return int(entry.name)
    raise RuntimeError(f"no worker of rank {rank} under process {agent}")


def speed_of(run_dir: Path) -> dict[str, Any]:
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if "step_ms" in row]
    timed = rows[WARM_UP_STEPS : -TRACED_STEPS - 2]
    step_ms = [row["step_ms"] for row in timed]
    median = statistics.median(step_ms)
    typical = min(timed, key=lambda row: abs(row["step_ms"] - median))
    profile = run_dir / "profile.json"
    return {
        "steps": len(timed),
        "step_ms": median,
        "step_ms_quartiles": statistics.quantiles(step_ms, n=4) if len(step_ms) > 1 else None,
        "tokens_per_second": typical["tokens_per_second"],
        "mfu_palm": typical["mfu_palm"],
        "mfu_causal": typical["mfu_causal"],
        "peak_memory_gib": rows[-1].get("peak_memory_gib"),
        "data_wait_ms": statistics.median(row["data_wait_ms"] for row in timed),
        "trace": json.loads(profile.read_text()) if profile.exists() else None,
    }


def differences(one: Path, other: Path) -> dict[str, Any]:
    """Whether two runs saw equal batches, and the largest relative difference of their losses."""

    def by_step(run_dir: Path) -> dict[int, dict[str, Any]]:
        rows = read_rows(run_dir / "metrics.jsonl")
        return {row["step"]: row for row in rows if "loss_nats" in row}

    a, b = by_step(one), by_step(other)
    common = sorted(a.keys() & b.keys())
    apart = [abs(a[s]["loss_nats"] - b[s]["loss_nats"]) / a[s]["loss_nats"] for s in common]
    return {
        "steps": len(common),
        "all_steps": a.keys() == b.keys(),
        "equal_batches": all(a[s]["batch_sha256"] == b[s]["batch_sha256"] for s in common),
        "largest_loss_difference": max(apart),
        "mean_loss_difference": statistics.fmean(apart),
    }


def events_of(run_dir: Path) -> list[str]:
    return [f"{row['event']} {row['step']}" for row in read_rows(run_dir / "events.jsonl")]


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown; efficiency is against the single GPU's tokens a second."""
    about = results["environment"]
    rows = [row for row in results["speed"] if "step_ms" in row]
    rows.sort(key=lambda row: (row["gpus"], row["name"]))
    single = next(row["tokens_per_second"] for row in rows if row["gpus"] == 1)
    lines = [
        f"{about['gpus']} × {about['device']}, torch {about['torch']}, NCCL {about['nccl']}, "
        f"`{about['config']}`, {' '.join(about['settings'])}; median of the steps after "
        f"{about['warm_up_steps']}.",
        "",
        "| GPUs | strategy | ms a step [quartiles] | tokens/s | efficiency | PaLM | causal | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, _, high = row["step_ms_quartiles"]
        efficiency = row["tokens_per_second"] / single / row["gpus"]
        strategy = row["name"].split(" ", 1)[-1] if row["gpus"] > 1 else "–"
        mfu = [f"{100 * (row[key] or 0):.1f} %" for key in ("mfu_palm", "mfu_causal")]
        lines.append(
            f"| {row['gpus']} | {strategy} | {row['step_ms']:.1f} [{low:.1f}–{high:.1f}] "
            f"| {row['tokens_per_second']:,.0f} | {100 * efficiency:.1f} % | {' | '.join(mfu)} "
            f"| {row['peak_memory_gib'] or 0:.1f} |"
        )
    lines += [
        "",
        "| GPUs: ms a step of the first rank | step | kernels | exchange | exposed | idle |",
        "|---|---|---|---|---|---|",
    ]
    figures = ("step_ms", "kernels_ms", "exchange_ms", "exposed_exchange_ms", "idle_ms")
    for row in rows:
        if row["trace"]:
            numbers = " | ".join(f"{row['trace'][figure]:.1f}" for figure in figures)
            lines.append(f"| {row['gpus']} | {numbers} |")
    lines += [
        "",
        "| against the undisturbed run | steps | equal batches | largest loss difference | mean |",
        "|---|---|---|---|---|",
    ]
    labels = {"two undisturbed runs": "undisturbed, shared Muon", "disturbed": "disturbed"}
    for name, label in labels.items():
        if name in results:
            found = results[name]
            lines.append(
                f"| {label} | {found['steps']} | {'yes' if found['equal_batches'] else 'NO'} "
                f"| {found['largest_loss_difference']:.1e} | {found['mean_loss_difference']:.1e} |"
            )
    if "disturbed" in results:
        disturbed = results["disturbed"]
        back = disturbed["seconds from the kill to the next new step"]
        lines += [
            "",
            f"Disturbed run: exit code {disturbed['exit']}, {disturbed['seconds']:.0f} s in all, "
            f"{back:.0f} s from the SIGKILL to the next new step, "
            f"goodput {100 * disturbed['goodput']:.0f} %.",
            f"Events: {', '.join(disturbed['events'])}.",
        ]
    return "\n".join(lines)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": "cpu" if args.cpu else torch.cuda.get_device_name(0),
        "gpus": args.gpus,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None if args.cpu else ".".join(map(str, torch.cuda.nccl.version())),
        "python": platform.python_version(),
        "config": args.config.name,
        "settings": args.set,
        "warm_up_steps": WARM_UP_STEPS,
    }


def profile_worker(args: argparse.Namespace) -> None:
    """One rank of a profiled run: traces the steps after warm-up, the first rank writes."""
    from matilda_train import load_config, train

    config = load_config(args.config, args.set)
    if not torch.cuda.is_available():
        train(config, run_dir=args.work_dir, data_dir=args.data_dir)
        return
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    begin, calls = config.train.total_steps - TRACED_STEPS, 0
    marks: list[float] = []

    def on_phase(name: str) -> None:
        nonlocal calls
        calls += name == "training"
        if name == "training" and calls in (begin, begin + TRACED_STEPS):
            torch.cuda.synchronize()
            marks.append(time.perf_counter())
            (profiler.start if calls == begin else profiler.stop)()

    train(config, run_dir=args.work_dir, data_dir=args.data_dir, on_phase=on_phase)
    if int(os.environ.get("RANK", "0")) == 0:
        row = divide(profiler.events(), 1e3 * (marks[1] - marks[0]), TRACED_STEPS)
        (args.work_dir / "profile.json").write_text(json.dumps(row))


def divide(events: Any, wall_ms: float, steps: int) -> dict[str, Any]:
    """Milliseconds a step: kernels other than NCCL's, NCCL's, NCCL's beside nothing else, idle."""
    kernels, exchange = [], []
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            span = (event.time_range.start, event.time_range.end)
            (exchange if "nccl" in event.name.lower() else kernels).append(span)
    busy, both = union(kernels), union(kernels + exchange)
    return {
        "step_ms": wall_ms / steps,
        "kernels_ms": busy / 1e3 / steps,
        "exchange_ms": union(exchange) / 1e3 / steps,
        "exposed_exchange_ms": (both - busy) / 1e3 / steps,
        "idle_ms": wall_ms / steps - both / 1e3 / steps,
    }


def union(spans: list[tuple[float, float]]) -> float:
    """Length covered by any of the spans, which may overlap."""
    total, end = 0.0, float("-inf")
    for begin, finish in sorted(spans):
        total += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return total


if __name__ == "__main__":
    main()
