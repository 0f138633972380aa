"""Anneal a checkpoint of a run's stable phase into a finished model, in a run of its own."""

from __future__ import annotations

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.stop_signals import StopRequest

STOP = StopRequest().install()  # in the first line: what follows takes time

import argparse
import os
import time
from pathlib import Path

from matilda_train.app import add_run_options, run_app, train_and_tell
from matilda_train.arguments import TeachingParser
from matilda_train.duration import parse_count

EXAMPLES = """examples:
  uv run apps/decay.py --run runs/quickstart --from-step 200 --tokens 100K
  uv run apps/decay.py --run runs/hero --from-step 5000 --tokens 500M
  uv run apps/decay.py --run runs/hero --from-step 10000 --tokens 1B --shape 1-sqrt \\
      --final-lr-fraction 0.05 --run-dir runs/hero-5B

The run goes on with the same data where the checkpoint stood; the parent is only read. The same
command goes on where it stopped. Checkpoints of the stable phase that later ones would replace are
kept by `ckpt.keep_every`. Exit codes: 0 finished, 2 bad input, 3 diverged, 4 disk or checkpoint
failure, 5 hung, 75 stopped by a signal after a clean save.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "--run", required=True, type=Path, metavar="DIR", help="run directory of the parent"
    )
    parser.add_argument(
        "--from-step",
        required=True,
        type=int,
        metavar="STEP",
        help="checkpoint of it to begin from (`matilda-ckpt ls DIR` lists them)",
    )
    parser.add_argument(
        "--tokens", required=True, metavar="N", help="tokens of the decay, e.g. 500M or 1_048_576"
    )
    parser.add_argument(
        "--shape", help="linear, 1-sqrt, cosine, exponential or power (default: the parent's)"
    )
    parser.add_argument(
        "--final-lr-fraction",
        type=float,
        metavar="X",
        help="learning rate at the end over its peak (default: the parent's)",
    )
    add_run_options(
        parser,
        run_dir_help="directory of the new run (default: DIR-decay-STEP-N beside the parent)",
        set_help="override fields that a resume may change, e.g. train.micro_batch_size=32",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    STOP.end_after(args.grace_seconds)
    from matilda_train import RunDir

    try:
        tokens = parse_count(args.tokens)
    except ValueError as error:
        raise ValueError(f"`--tokens`: {error}") from None
    RunDir.read(args.run)  # a mistake is named before torch loads, for seconds
    from matilda_train import open_decay
    from matilda_train.decay import decay_dir

    target = args.run_dir or decay_dir(args.run, from_step=args.from_step, tokens=tokens)
    while int(os.environ.get("RANK", "0")) > 0 and not (target / "run.json").is_file():
        time.sleep(0.2)  # the first rank makes it; should that fail, torchrun ends this one
    decay = open_decay(
        args.run,
        from_step=args.from_step,
        tokens=tokens,
        run_dir=target,
        data_dir=args.data_dir,
        shape=args.shape,
        final_lr_fraction=args.final_lr_fraction,
        overrides=args.set,
    )
    copied = f"step {args.from_step:,} of {args.run} copied to {decay.run_dir}"
    return train_and_tell(
        decay.config,
        run_dir=decay.run_dir,
        data_dir=args.data_dir,
        stop=STOP,
        note=copied if decay.is_new else "",
    )


if __name__ == "__main__":
    run_app(main)
