"""Train a language model from scratch, or go on with a run that was stopped."""

from __future__ import annotations

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.stop_signals import StopRequest

STOP = StopRequest().install()  # in the first line: what follows takes time

import argparse
from pathlib import Path

from matilda_train.app import (
    add_preflight_options,
    add_run_options,
    check_request,
    look_before,
    run_app,
    train_and_tell,
)
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run apps/train.py --config configs/quickstart.json
  uv run apps/train.py --config configs/base_152m_v2.json --data-dir data/smollm_mix \\
      --run-dir runs/hero --set train.micro_batch_size=16 log.wandb=true
  uv run apps/train.py --config configs/calibration.json --dry-run --set model.d_model=128 \\
      model.n_layers=2 train.total_steps=20 train.device=cpu train.compile=false
  uv run apps/train.py --config configs/base_152m_v2.json --data-dir data/smollm_mix \\
      --preflight --dollars-per-hour 2.99

The same command goes on where the run stopped. Every field that --set takes is described in
packages/matilda-train/src/matilda_train/config/. A run that should take over an hour is looked at,
as by --preflight, before its first step. Exit codes: 0 finished, 2 bad input, 3 diverged, 4 disk or
checkpoint failure, 5 hung, 75 stopped by a signal after a clean save (run it again after 5 and 75).
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="JSON config of the run"
    )
    add_run_options(
        parser,
        run_dir_help="run directory (default: runs/CONFIG-NAME)",
        set_help="override config fields, e.g. optim.lr=0.01",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="at most 20 steps on synthetic tokens, keep nothing"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only say, within a second, whether config, data and run directory can be used; exit "
        "0 for yes, 2 for no",
    )
    add_preflight_options(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    STOP.end_after(args.grace_seconds)
    from matilda_train import load_config

    config = load_config(args.config, args.set)
    run_dir = args.run_dir or Path("runs") / args.config.stem
    if args.check:
        if not args.dry_run:
            check_request(config, run_dir, args.data_dir)
        return 0
    answer = look_before(config, run_dir, args, dry_run=args.dry_run)
    if answer is not None:
        return answer
    return train_and_tell(
        config,
        run_dir=run_dir,
        data_dir=args.data_dir,
        stop=STOP,
        dry_run=args.dry_run,
        json_to=args.json,
    )


if __name__ == "__main__":
    run_app(main)
