"""Kill a run again and again, resume it, and compare it bit for bit with an undisturbed twin."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import add_data_option, add_json_option, add_set_option, run_app, show
from matilda_train.arguments import TeachingParser
from matilda_train.resume_report import as_json, describe
from matilda_train.stop_signals import EXIT_PREEMPTED

EXAMPLES = """examples:
  uv run apps/verify_resume.py --config configs/verify_resume.json --kills 10 --run-dir runs/proof
  uv run apps/verify_resume.py --config configs/base_152m_v2.json --data-dir data/corpus \\
      --sigkills 5 --sigterms 2 --run-dir runs/proof-fast --set train.total_steps=200
  uv run apps/verify_resume.py --config configs/base_152m_v2.json --data-dir data/corpus \\
      --sigkills 2 --sigterms 1 --run-dir runs/proof-bits \\
      --set train.total_steps=60 train.deterministic=true

With --sigkills or --sigterms it is one long run, whose goodput and seconds to a first step are
printed too. On a CPU and with `train.deterministic` all bits must be equal; else the state at each
resume point must, and losses may differ as those of two undisturbed runs do.

The same command goes on with a proof that was interrupted, however; the pause is left out of its
account of time. Where a command may only take so long, --pause-after ends it between two lives.
Exit codes: 0 no difference; 1 a difference, listed; 2 bad input; 75 paused.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add("--config", required=True, type=Path, metavar="FILE", help="JSON config of the run")
    add("--run-dir", required=True, type=Path, metavar="DIR", help="directory of the proof's runs")
    add_data_option(parser)
    add_set_option(parser, "override config fields, e.g. train.device=cuda")
    add(
        "--kills",
        type=int,
        default=20,
        metavar="N",
        help="how often to end a process of many short runs (default: %(default)s)",
    )
    add(
        "--sigkills",
        type=int,
        default=0,
        metavar="N",
        help="instead: how often to end one long run by SIGKILL (default: %(default)s)",
    )
    add(
        "--sigterms",
        type=int,
        default=0,
        metavar="N",
        help="and how often by SIGTERM (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the moments to kill at (default: %(default)s)",
    )
    add(
        "--new-machines",
        action="store_true",
        help="empty the compilers' caches before each resume, as if another machine had only the "
        "run directory",
    )
    add(
        "--pause-after",
        type=float,
        default=math.inf,
        metavar="S",
        help="after S seconds start no further process, and end with 75 (default: never)",
    )
    add_json_option(parser)
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
            new_machines=args.new_machines,
            pause_after_seconds=args.pause_after,
            display=display,
        )
    show(describe(report), as_json(report), args.json)
    if report.differences:
        return 1
    return 0 if report.complete else EXIT_PREEMPTED


if __name__ == "__main__":
    run_app(main)
