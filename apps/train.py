"""Train a language model from scratch, or go on with a run that was stopped."""

from __future__ import annotations

from matilda_train.stop_signals import EXIT_PREEMPTED, StopRequest

STOP = StopRequest().install()  # in the first line: what follows takes time

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from matilda_train.app import EXIT_BAD_INPUT, run_app

if TYPE_CHECKING:
    from matilda_train import RunConfig

LONG_RUN_SECONDS = 3600.0

EXAMPLES = """examples:
  uv run apps/train.py --config configs/quickstart.json
  uv run apps/train.py --config configs/base_152m_v2.json --data-dir data/smollm_mix \\
      --run-dir runs/hero --set train.micro_batch_size=16 log.wandb=true
  uv run apps/train.py --config configs/calibration.json --dry-run \\
      --set model.d_model=128 model.n_layers=2 train.total_steps=20 train.device=cpu

  uv run apps/train.py --config configs/base_152m_v2.json --data-dir data/smollm_mix \\
      --preflight --dollars-per-hour 2.99

A run that should take over an hour is looked at in the same way before its first step.
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
        "--preflight",
        action="store_true",
        help="only look whether the run would work, how long it takes and what it costs: data, "
        "memory (real steps), disk, time; exit 0 for yes, 2 for no; changes nothing",
    )
    parser.add_argument(
        "--no-preflight", action="store_true", help="do not look before a long run either"
    )
    parser.add_argument("--deep", action="store_true", help="pre-flight: hash every byte of data")
    parser.add_argument("--json", action="store_true", help="pre-flight: print it as JSON")
    parser.add_argument(
        "--dollars-per-hour", type=float, metavar="X", help="pre-flight: price of the machine"
    )
    parser.add_argument(
        "--grace-seconds",
        type=float,
        metavar="N",
        help="on SIGTERM, SIGINT or SIGUSR1 save and stop, but end after N s in any case",
    )
    return parser.parse_args()


def look_before(config: RunConfig, run_dir: Path, args: argparse.Namespace) -> int | None:
    """Exit code of a pre-flight that was asked for or says no; None to go on and train."""
    from matilda_train import estimate_seconds, run_preflight

    if not args.preflight:
        new = not args.dry_run and not (run_dir / "run.json").exists()
        if args.no_preflight or not new or estimate_seconds(config) < LONG_RUN_SECONDS:
            return None
    is_main = int(os.environ.get("RANK", "0")) == 0
    report = run_preflight(
        config,
        run_dir=run_dir,
        data_dir=args.data_dir,
        dollars_per_hour=args.dollars_per_hour,
        deep=args.deep,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        note=lambda text: print(text, file=sys.stderr) if is_main else None,
    )
    if is_main:
        print(json.dumps(report.to_dict(), indent=2) if args.json else report, flush=True)
    if args.preflight or not report.ok:
        return 0 if report.ok else EXIT_BAD_INPUT
    return None


def main() -> int:
    args = parse_arguments()
    STOP.end_after(args.grace_seconds)
    from matilda_train import TerminalDisplay, load_config

    config = load_config(args.config, args.set)
    # This loads torch, which takes seconds: mistakes are dealt with already.
    from matilda_train import train

    run_dir = args.run_dir or Path("runs") / args.config.stem
    answer = look_before(config, run_dir, args)
    if answer is not None:
        return answer
    STOP.begin()
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
