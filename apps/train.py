"""Train a language model from scratch, or go on with a run that was stopped."""

from __future__ import annotations

from matilda_train.stop_signals import EXIT_PREEMPTED, StopRequest

STOP = StopRequest().install()  # in the first line: what follows takes time

import argparse
import os
from pathlib import Path

from matilda_train.app import run_app

EXAMPLES = """examples:
  uv run apps/train.py --config configs/quickstart.json
  uv run apps/train.py --config configs/base_152m_v2.json --data-dir data/smollm_mix \\
      --run-dir runs/hero --set train.micro_batch_size=16 log.wandb=true
  uv run apps/train.py --config configs/calibration.json --dry-run \\
      --set model.d_model=128 model.n_layers=2 train.total_steps=20 train.device=cpu

Running the same command again goes on where the run stopped. Exit codes: 0 finished, 2 bad input,
3 diverged, 4 disk or checkpoint failure, 5 hung, 75 stopped by a signal after a clean save (run it
again after 5 and 75).
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path, help="JSON config of the run")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="a.b=c",
        help="override config fields, e.g. optim.lr=0.01",
    )
    parser.add_argument("--data-dir", type=Path, help="prepared data set (default: data.dir)")
    parser.add_argument("--run-dir", type=Path, help="run directory (default: runs/CONFIG-NAME)")
    parser.add_argument(
        "--dry-run", action="store_true", help="at most 20 steps on synthetic tokens, keep nothing"
    )
    parser.add_argument(
        "--grace-seconds",
        type=float,
        metavar="N",
        help="on SIGTERM, SIGINT or SIGUSR1 save and stop, but end after N s in any case",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    STOP.end_after(args.grace_seconds)
    from matilda_train import TerminalDisplay, load_config

    config = load_config(args.config, args.set)
    # This loads torch, which takes seconds: mistakes are dealt with already.
    from matilda_train import train

    STOP.begin()
    run_dir = args.run_dir or Path("runs") / args.config.stem
    with TerminalDisplay() as display:
        result = train(
            config,
            run_dir=run_dir,
            data_dir=args.data_dir,
            dry_run=args.dry_run,
            stop=lambda: bool(STOP),
            display=display,
        )
    if int(os.environ.get("RANK", "0")) > 0:
        return EXIT_PREEMPTED if result.status == "preempted" else 0
    if result.status == "preempted":
        print(f"Stopped at step {result.step:,}; run the same command again to go on.")
        return EXIT_PREEMPTED
    if result.status == "already_finished":
        print(f"This run is complete: {result.step:,} steps in {result.run_dir}")
    elif args.dry_run:
        print(f"Dry run of {result.step:,} steps passed; nothing was kept.")
        return 0
    else:
        print(f"\n{result.sample}\n")
        print(
            f"Held-out bits per byte: {result.first_bits_per_byte:.4f} before training, "
            f"{result.final_bits_per_byte:.4f} after {result.step:,} steps."
        )
        print(f"Run: {result.run_dir}")
    print(f"Next: uv run apps/generate.py --run {result.run_dir} --prompt 'def '")
    return 0


if __name__ == "__main__":
    run_app(main)
