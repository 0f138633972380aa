"""Tokens per second of a whole training step, per config and back end, beside its peers.

A step is forward, backward, gradient clipping and the optimizer, compiled, bf16: on one micro-batch
of random tokens, the same in every step, or with `--data-dir` on fresh ones of text; with
`--tokens-per-step` on as many as make that many tokens, as a run does (peers as well). Each case
runs in its own process, so that none inherits another's compiler state or memory: all compile at
once, then each is timed alone, median of `--steps` steps by device events. On a machine without
CUDA the cases shrink to toy shapes, eager, in float32.

`--peer-dir` holds public checkouts: `nanoGPT/model.py`, `nanochat/nanochat/gpt.py`; transformers
is used when it can be imported. Peers run at the hero's shape and their MFU counts the hero's
FLOPs, so that the column orders them as tokens per second do.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from step_case import Case, measure
from step_table import merge_runs, show

from matilda_train.arguments import TeachingParser
from matilda_train.errors import is_out_of_memory

EXAMPLES = """\
examples:
  python benchmarks/step.py --quick                        two toy steps, also without a GPU
  python benchmarks/step.py --peer-dir DIR --json all.json every case, and the peers found in DIR
  python benchmarks/step.py --peer-dir DIR --data-dir DATA --tokens-per-step 524288
                                                           as a run trains: text, accumulation
  python benchmarks/step.py --cases 'hero,hero loss=*'     back ends of one field beside the choice
  python benchmarks/step.py --cases hero --batch 32 --profile
                                                           one case's kernels, by time (in --json)
  python benchmarks/step.py --table all.json --write docs/RESULTS.md
                                                           print a run again and put it on a page
"""

# What `auto` takes on Hopper where neither flash-attn-4 nor quack-kernels is installed.
WITHOUT_EXTRAS = {"attention": "cudnn", "matmul": "fused", "norm": "fused", "loss": "fused"}

# "hero" and its kin are left to `auto`; every other case names one back end instead.
CASES = [
    Case("hero", "base_152m_v2", 64),
    Case("hero loss=fused", "base_152m_v2", 64, {"loss": "fused"}),
    Case("hero loss=fused_fp8", "base_152m_v2", 64, {"loss": "fused_fp8"}),
    Case("hero adamw", "base_152m_v2", 64, optimizer="adamw"),
    Case("hero attention=fa4", "base_152m_v2", 64, {"attention": "fa4"}),
    Case("hero attention=cudnn", "base_152m_v2", 64, {"attention": "cudnn"}),
    Case("hero matmul=quack", "base_152m_v2", 64, {"matmul": "quack"}),
    Case("hero matmul=quack_residual", "base_152m_v2", 64, {"matmul": "quack_residual"}),
    Case("hero matmul=fused", "base_152m_v2", 64, {"matmul": "fused"}),
    Case("hero without extras", "base_152m_v2", 64, WITHOUT_EXTRAS),
    Case("hero attention=flash", "base_152m_v2", 32, {"attention": "flash"}),
    Case("hero attention=flex", "base_152m_v2", 32, {"attention": "flex"}),
    Case("hero loss=plain", "base_152m_v2", 16, {"loss": "plain"}),
    Case("hero loss=chunked", "base_152m_v2", 32, {"loss": "chunked"}),
    Case("hero loss=liger", "base_152m_v2", 32, {"loss": "liger"}),
    Case("hero matmul=plain", "base_152m_v2", 32, {"matmul": "plain"}),
    Case("hero norm=fused", "base_152m_v2", 64, {"norm": "fused"}),
    Case("hero norm=plain", "base_152m_v2", 32, {"norm": "plain"}),
    Case("v1", "base_124m", 64, optimizer="adamw"),
    Case("350m", "base_350m", 16),
    Case("nanoGPT", "base_152m_v2", 32, optimizer="its own", peer="nanoGPT"),
    Case("nanochat", "base_152m_v2", 32, optimizer="its own", peer="nanochat"),
    Case("transformers Qwen3", "base_152m_v2", 16, optimizer="adamw", peer="transformers"),
]


def main() -> int:
    names = "\n".join(f"  {case.name:24} {case.config}, batch {case.batch}" for case in CASES)
    parser = TeachingParser(description=__doc__, epilog=f"cases:\n{names}\n\n{EXAMPLES}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="hero, v1, peers: 3 steps; under a minute on 2 cores",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows here")
    parser.add_argument(
        "--peer-dir", type=Path, metavar="DIR", help="folder of public peer checkouts"
    )
    parser.add_argument(
        "--cases",
        default="*",
        metavar="PATTERNS",
        help="shell patterns of names, by comma; run in their order",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps a case (default 20)")
    parser.add_argument("--batch", type=int, help="sequences in a micro-batch, for every case")
    parser.add_argument(
        "--tokens-per-step",
        type=int,
        default=0,
        metavar="N",
        help="accumulate micro-batches up to so many (default: one micro-batch)",
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="prepared text (default: random tokens)"
    )
    parser.add_argument("--blocks", action="store_true", help="compile each block by itself")
    parser.add_argument(
        "--jobs", type=int, default=8, help="cases that compile at once (default 8)"
    )
    parser.add_argument(
        "--limit", type=float, default=1e9, metavar="S", help="start no case after so many seconds"
    )
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table there")
    parser.add_argument(
        "--table",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="print this --json file again, rows that failed from the next; run nothing",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        const="*",
        default="",
        metavar="PATTERN",
        help="add the kernels' times of these cases (of all)",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parent", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.typed = json.loads(args.parent) if args.parent else sys.argv[1:]
    if args.table:
        runs = [json.loads(file.read_text()) for file in args.table]
        show(merge_runs(runs), args.write)
        return 0
    patterns = args.cases.split(",")
    named = [c for pattern in patterns for c in CASES if fnmatch.fnmatch(c.name, pattern)]
    cases = list({case.name: case for case in named}.values())
    if args.batch:
        cases = [replace(case, batch=args.batch) for case in cases]
    if args.child:
        case = next(case for case in cases if case.name == args.child)
        return measure(case, args)
    if args.data_dir is not None:
        from matilda_data import DataError, open_dataset

        try:
            open_dataset(args.data_dir)
        except DataError as error:
            parser.error(str(error))
    cases = [case for case in cases if _available(case, args)]
    import torch

    if not torch.cuda.is_available():
        args.jobs = 1
    if args.quick and args.cases == "*":
        cases = [case for case in cases if case.name in ("hero", "v1", "nanoGPT", "nanochat")]
    if not cases:
        print(f"step.py: no case matches {args.cases!r} on this machine", file=sys.stderr)
        return 2
    rows = _run(cases, args)
    failed = {row["name"]: RuntimeError(row["error"]) for row in rows if "error" in row}
    crowded = [name for name, error in failed.items() if is_out_of_memory(error)]
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
        "quack_all": "quack",
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
            if any(
                not (work / f"{case.slug}.ready").exists() and process.poll() is None
                for case, process in running.values()
            ):
                time.sleep(0.1)  # time nothing while another case still compiles
                continue
            for name in list(running):
                case, process = running.pop(name)
                (work / f"{case.slug}.go").touch()
                process.wait()
                result = work / f"{case.slug}.json"
                row = {"name": name, "batch": case.batch, "optimizer": case.optimizer}
                if result.exists():
                    row |= json.loads(result.read_text())
                else:
                    errors = (work / f"{case.slug}.err").read_text(errors="replace")
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
    command += ["--quick"] * args.quick
    command += ["--profile"] * fnmatch.fnmatch(case.name, args.profile)
    command += ["--blocks"] * args.blocks
    command += ["--parent", json.dumps(args.typed)]
    for option, folder in (("--peer-dir", args.peer_dir), ("--data-dir", args.data_dir)):
        if folder is not None:
            command += [option, str(folder.resolve())]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=(work / f"{case.slug}.err").open("w"),
        env=environment,
    )


if __name__ == "__main__":
    sys.exit(main())
