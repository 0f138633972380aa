"""Compare changes to a config, one a row, over paired seeds; or find its best rates on a grid."""

from __future__ import annotations

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.stop_signals import EXIT_PREEMPTED, StopRequest

STOP = StopRequest().install()  # in the first line: what follows takes time

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from matilda_train.app import (
    EXIT_ENVIRONMENT,
    add_data_option,
    add_json_option,
    add_set_option,
    run_app,
    show,
)
from matilda_train.arguments import TeachingParser
from matilda_train.run_dir import write_output

if TYPE_CHECKING:
    from matilda_train.ablation import Progress, Study, StudyDisplay, StudyResult

EXAMPLES = """examples:
  uv run apps/ablate.py --config configs/quickstart.json --out runs/try --variants mha,adamw \\
      --seeds 2 --set train.total_steps=40 optim.warmup_steps=5
  uv run apps/ablate.py --config configs/ablation_48m.json --data-dir data/mix --out runs/study \\
      --variants no_qk_norm,mha,mqa,adamw --seeds 3 --write docs/ABLATIONS.md
  uv run apps/ablate.py --config configs/ablation_48m.json --data-dir data/mix --out runs/study \\
      --variants no_qk_norm adamw:optim.lr=0.002 cap50:model.logit_softcap=50 --gpus 2
  uv run apps/ablate.py --config configs/base_152m_v2.json --data-dir data/mix --out runs/rates \\
      --grid optim.lr=0.002,0.004,0.008 optim.weight_decay=0.01,0.1 --halving 2 \\
      --set train.total_steps=200 optim.warmup_steps=20

The baseline is always a row. Seed k of every row has the same seed of the weights and the same
batches. The same command goes on where it was stopped or killed; more rows or seeds are added.
Exit codes: 0 every run has ended, diverged ones too; 2 bad input; 4 a run failed; 75 stopped, run
it again.

rows:
"""


def parse_arguments() -> argparse.Namespace:
    from matilda_train.ablation import VARIANTS

    rows = "\n".join(f"  {name:18}{variant.reason}" for name, variant in VARIANTS.items())
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES + rows)
    add = parser.add_argument
    add("--config", required=True, type=Path, metavar="FILE", help="JSON config of the baseline")
    add_set_option(parser, "override config fields of every row, e.g. train.total_steps=200")
    add_data_option(parser)
    add("--out", required=True, type=Path, metavar="DIR", help="directory of the study")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--variants",
        nargs="+",
        metavar="ROW",
        help="names of rows listed below, or a new one as NAME:a.b=c,…",
    )
    what.add_argument(
        "--grid",
        nargs="+",
        metavar="a.b=X,Y",
        help="values of fields to try; every combination is a row",
    )
    add(
        "--halving",
        type=int,
        default=1,
        metavar="N",
        help="rounds of a grid: after each the worse half of the rows ends (default: %(default)s)",
    )
    add("--seeds", type=int, default=3, metavar="N", help="runs of a row (default: %(default)s)")
    add("--gpus", type=int, metavar="N", help="GPUs to use (default: the one that torch takes)")
    add(
        "--jobs-per-gpu",
        type=int,
        default=1,
        metavar="N",
        help="runs at once on each GPU (default: %(default)s)",
    )
    add(
        "--take-turns",
        action="store_true",
        help="of the runs on a GPU one trains at a time, while the others compile",
    )
    add("--in-process", action="store_true", help="one run after another, in this process")
    add(
        "--stop-after",
        type=float,
        metavar="S",
        help="save and stop after S seconds, with 75 (default: when all is done)",
    )
    add(
        "--discard-checkpoints",
        action="store_true",
        help="remove those of runs that have finished; their metrics stay",
    )
    add(
        "--earlier",
        type=Path,
        metavar="FILE",
        help="JSON of this study from a machine that is gone: its runs are not trained again",
    )
    add("--report", action="store_true", help="train nothing, only read what there is")
    add("--write", type=Path, metavar="PAGE", help="put the table into this Markdown page as well")
    add("--name", help="section of that page (default: the last part of --out)")
    add_json_option(parser)
    return parser.parse_args()


class KeepingDisplay:
    """A display beside which `keep()` is called whenever another run has ended."""

    def __init__(self, display: StudyDisplay, keep: Callable[[], None]) -> None:
        self._display = display
        self._keep = keep
        self._ended: int | None = None

    def show(self, progress: Progress) -> None:
        self._display.show(progress)
        ended, self._ended = self._ended, len(progress.done)
        if ended is not None and ended < len(progress.done):
            self._keep()

    def note(self, text: str) -> None:
        self._display.note(text)


def main() -> int:
    args = parse_arguments()
    from torch.cuda import device_count

    from matilda_train import ablation, load_config

    config = load_config(args.config, args.set)
    where = ablation.places(args.gpus, args.jobs_per_gpu, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if (args.gpus or 1) > (seen := max(1, device_count())):
        raise ValueError(f"`--gpus` is {args.gpus}, but torch sees {seen} device(s) here.")
    rows = (
        ablation.grid_rows(config, args.grid)
        if args.grid
        else ablation.resolve_rows(config, args.variants)
    )
    earlier = ablation.read_earlier(args.earlier, rows, config) if args.earlier else None
    if args.stop_after is not None and not args.stop_after >= 0:
        raise ValueError(f"`--stop-after` is {args.stop_after:g}, but must be 0 or more.")
    as_files = [] if args.json in (None, "-") else [Path(args.json)]

    def keep(study: Study) -> StudyResult:
        """What there is, as JSON: whoever is killed later has had it."""
        result = ablation.rank_grid(study) if args.grid else ablation.read_study(study)
        for file in (study.out / "ablation.json", *as_files):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_output(file, json.dumps(result.to_dict(), indent=1) + "\n")
        return result

    STOP.begin()
    deadline = None if args.stop_after is None else time.monotonic() + args.stop_after
    with ablation.StudyTerminal() as display:

        def run(study: ablation.Study) -> ablation.Ending:
            def keep_what_ended() -> None:
                with suppress(OSError, ValueError):  # no room, or no baseline yet: at the end then
                    keep(study)

            return ablation.run_study(
                study,
                data_dir=args.data_dir,
                where=() if args.report else where,
                in_process=args.in_process and not args.report,
                take_turns=args.take_turns,
                keep_checkpoints=not args.discard_checkpoints,
                stop=lambda: bool(STOP),
                stop_after=None if deadline is None else deadline - time.monotonic(),
                display=KeepingDisplay(display, keep_what_ended),
            )

        rounds = args.halving if args.grid else 1
        study, ending = ablation.run_halving(
            rows, seeds=args.seeds, out=args.out, rounds=rounds, run=run, earlier=earlier
        )
    code = {"complete": 0, "stopped": EXIT_PREEMPTED, "failed": EXIT_ENVIRONMENT}[ending]
    try:
        result = keep(study)
    except ValueError as nothing_yet:
        print(nothing_yet, file=sys.stderr)
        return code
    described = ablation.describe_grid if args.grid else ablation.describe_study
    show(described(result), result.to_dict(), None if as_files else args.json)
    if args.write:
        write = ablation.write_grid if args.grid else ablation.write_document
        given = [word for word in sys.argv[1:] if word != "--report"]  # what made the runs
        command = "uv run apps/ablate.py " + shlex.join(given)
        write(result, args.write, name=args.name or args.out.name, command=command)
        print(f"Written: {args.write}", file=sys.stderr)
    return code


if __name__ == "__main__":
    run_app(main)
