"""Kill a run again and again, resume it, and compare it bit for bit with an undisturbed twin."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import run_app
from matilda_train.arguments import TeachingParser
from matilda_train.resume_report import as_json, describe
from matilda_train.stop_signals import EXIT_PREEMPTED

EXAMPLES = """examples:
  uv run apps/verify_resume.py --config configs/verify_resume.json --kills 500 --run-dir runs/proof
  uv run apps/verify_resume.py --config configs/base_152m_v2.json --data-dir data/corpus \\
      --sigkills 5 --sigterms 2 --run-dir runs/proof-fast --set train.total_steps=200
  uv run apps/verify_resume.py --config configs/base_152m_v2.json --data-dir data/corpus \\
      --sigkills 2 --sigterms 1 --run-dir runs/proof-bits \\
      --set train.total_steps=60 train.deterministic=true

--kills ends that many lives of many short runs, --sigkills and --sigterms those of one long run,
whose goodput is printed too. On a CPU and with `train.deterministic` all bits must be equal; else
the state at each resume point must, and losses may differ as those of two undisturbed runs do.

The same command goes on with a proof that was interrupted, however; the pause is left out of its
account of time. Where a command may only take so long, --pause-after ends it between two lives.
Exit codes: 0 no difference; 1 a difference, listed; 2 bad input; 75 paused.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--config", required=True, type=Path, help="JSON config of the run")
    parser.add_argument("--kills", type=int, default=20, help="lives of short runs to end (20)")
    parser.add_argument("--sigkills", type=int, default=0, help="SIGKILLs of one long run")
    parser.add_argument("--sigterms", type=int, default=0, help="SIGTERMs of one long run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument(
        "--pause-after", type=float, default=math.inf, metavar="SECONDS", help="begin no life later"
    )
    parser.add_argument("--run-dir", required=True, type=Path, help="directory of all its runs")
    parser.add_argument("--data-dir", type=Path, help="prepared data set (default: data.dir)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill points (0)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="config overrides"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    from matilda_train import TerminalDisplay
    from matilda_train.verify_resume import verify_resume

    with TerminalDisplay() as display:
        report = verify_resume(
            args.config,
            work_dir=args.run_dir,
            data_dir=args.data_dir,
            kills=args.kills,
            spread=(args.sigkills, args.sigterms) if args.sigkills + args.sigterms else None,
            overrides=args.set,
            seed=args.seed,
            pause_after_seconds=args.pause_after,
            display=display,
        )
    print(describe(report))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(report), indent=2) + "\n", encoding="utf-8")
    if report.differences:
        return 1
    return 0 if report.complete else EXIT_PREEMPTED


if __name__ == "__main__":
    run_app(main)
