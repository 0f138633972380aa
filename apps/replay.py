"""Run one step of a run again, from the nearest checkpoint before it, and compare every bit."""

from __future__ import annotations

import argparse
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import run_app
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run apps/replay.py runs/hero/autopsies/step-00018211-nonfinite
  uv run apps/replay.py --run runs/hero --step 18200 --data-dir data/smollm_mix
  uv run apps/replay.py --run runs/hero --step 18200 --into runs/replay   keep its run directory

The same bits on a CPU, and on a GPU with train.deterministic=true; else the difference is stated.
Exit codes: 0 the same, or nothing to compare with; 1 a difference; 2 bad input; 4 no checkpoint.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("bundle", nargs="?", type=Path, help="autopsy bundle to replay")
    parser.add_argument("--run", type=Path, help="run directory (default: the bundle's)")
    parser.add_argument("--step", type=int, help="step, counted from 1 (default: the bundle's)")
    parser.add_argument("--data-dir", type=Path, help="prepared data set (default: data.dir)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: the run's)")
    parser.add_argument("--into", type=Path, help="new directory for the replay's own run")
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
    print(f"Step {replay.step:,}, replayed from step {replay.from_step:,}:")
    print(f"  loss {row['loss_nats']}, gradient norm {row['grad_norm']}, skipped {row['skipped']}")
    print(f"  batches so far {row['batch_sha256']}")
    if replay.expected is None:
        print("The run wrote no row of this step to compare with.")
    for difference in replay.differences:
        print(f"  differs in {difference}")
    if replay.expected is not None and not replay.differences:
        print("The same bits as in the run.")
    return 1 if replay.differences else 0


if __name__ == "__main__":
    run_app(main)
