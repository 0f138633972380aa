"""Run one step of a run again, from the nearest checkpoint before it, and compare every bit."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import add_data_option, add_json_option, run_app, show
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run apps/replay.py --run runs/quickstart --step 310
  uv run apps/replay.py --run runs/quickstart --step 310 --into runs/replay --json
  uv run apps/replay.py runs/hero/autopsies/step-00018211-nonfinite --data-dir data/smollm_mix

The same bits on a CPU, and on a GPU with train.deterministic=true; else the difference is stated.
Exit codes: 0 the same, or nothing to compare with; 1 a difference; 2 bad input; 4 no checkpoint.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add(
        "bundle", nargs="?", type=Path, help="autopsy bundle to replay, instead of --run and --step"
    )
    add("--run", type=Path, metavar="DIR", help="run directory (default: the bundle's)")
    add("--step", type=int, metavar="N", help="counted from 1 (default: the bundle's)")
    add_data_option(parser)
    add("--device", help="cpu, cuda, cuda:N or auto (default: the run's)")
    add(
        "--into",
        type=Path,
        metavar="DIR",
        help="new directory that keeps the replay's own run (default: a temporary one)",
    )
    add_json_option(parser)
    args = parser.parse_args()
    if args.bundle is None and (args.run is None or args.step is None):
        parser.error("give a bundle, or --run and --step")
    return args


def main() -> int:
    args = parse_arguments()
    from matilda_train import TerminalDisplay
    from matilda_train.replay import read_bundle, replay_step

    report = read_bundle(args.bundle) if args.bundle else None
    with TerminalDisplay() as display:
        replay = replay_step(
            args.run or args.bundle.resolve().parent.parent,
            report["step"] if report else args.step,
            report=report,
            data_dir=args.data_dir,
            device=args.device,
            scratch=args.into,
            display=display,
        )
    row = replay.row
    lines = [
        f"Step {replay.step:,}, replayed from step {replay.from_step:,}:",
        f"  loss {row['loss_nats']}, gradient norm {row['grad_norm']}, skipped {row['skipped']}",
        f"  batches so far {row['batch_sha256']}",
        *(f"  differs in {difference}" for difference in replay.differences),
    ]
    if replay.expected is None:
        lines.append("The run wrote no row of this step to compare with.")
    elif not replay.differences:
        lines.append("The same bits as in the run.")
    show("\n".join(lines), {**asdict(replay), "differences": replay.differences}, args.json)
    return 1 if replay.differences else 0


if __name__ == "__main__":
    run_app(main)
