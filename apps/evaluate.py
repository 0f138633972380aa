"""Score a run, a checkpoint or a transformers folder on question sets."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import add_device_option, add_json_option, run_app, show
from matilda_train.arguments import TeachingParser

TASKS = "hellaswag,arc_easy,piqa,lambada_openai,sciq,winogrande"
EXAMPLES = f"""examples:
  uv run apps/evaluate.py --run runs/hero --task-dir data/evals --compare pythia-160m,pythia-410m \\
      --write docs/RESULTS.md
  uv run apps/evaluate.py --run runs/hero --step 4000 --tasks hellaswag,piqa --task-dir data/evals
  uv run --extra eval apps/evaluate.py --run runs/hero --tasks arc_challenge,lambada_openai
  uv run --extra eval apps/evaluate.py --hf exports/hero --trust-remote-code --task-dir data/evals

Tasks are files of `--task-dir` (`TASK.jsonl`, `TASK_SPLIT.jsonl` or `.jsonl.gz`) or, without it,
tasks of lm-evaluation-harness, which loads their data from the Hugging Face hub. Default tasks:
{TASKS}.
For `--contamination`:
  uv run matilda-data overlap --evals data/evals/* --data-dir data/corpus --json overlap.json

A run's scores are kept in it, as `evals/step-00004000.json` and as a row of `metrics.jsonl`, unless
`--limit` is given. Exit codes: 0 done, 2 bad input, 4 no usable checkpoint, or the hub failed.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="DIR", help="run directory")
    what.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a `step-…` folder of a run's checkpoints"
    )
    what.add_argument(
        "--hf", type=Path, metavar="DIR", help="folder of a transformers model (extra `eval`)"
    )
    add = parser.add_argument
    add(
        "--step",
        type=int,
        metavar="N",
        help="checkpoint of --run to take (default: newest healthy one)",
    )
    add("--tasks", default=TASKS, metavar="A,B,…", help="names of tasks (default: those below)")
    add(
        "--task-dir",
        type=Path,
        metavar="DIR",
        help="folder of task files (default: lm-evaluation-harness' own, extra `eval`)",
    )
    add(
        "--limit",
        type=int,
        metavar="N",
        help="the first N items of each task only, and keep nothing (default: all)",
    )
    add(
        "--compare",
        default="",
        metavar="A,B,…",
        help="published Pythias to put beside it at the same tokens: pythia-70m, pythia-160m, "
        "pythia-410m, pythia-1b-deduped, … (default: none)",
    )
    add(
        "--contamination",
        type=Path,
        metavar="FILE",
        help="which items are in the training text, from `matilda-data overlap --json FILE`",
    )
    add(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens in one forward pass (default: by the device)",
    )
    add_device_option(parser)
    add("--write", type=Path, metavar="PAGE", help="put the tables into this Markdown page as well")
    add("--name", help="section of that page (default: the run and its step)")
    add_json_option(parser)
    add("--trust-remote-code", action="store_true", help="let the folder of --hf run its own code")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.batch_tokens is not None and args.batch_tokens < 1:
        raise ValueError(f"`--batch-tokens` must be 1 or more, not {args.batch_tokens}.")
    from matilda_train import RunDir, TerminalDisplay

    if args.run is not None:
        RunDir.read(args.run)  # a mistake is named before torch loads, for seconds
    from matilda_train.evals import evaluate_tasks, open_checkpoint, open_folder, open_run
    from matilda_train.evals.pythia import describe, footnotes
    from matilda_train.evals.results import record_in_run, table, write_page
    from matilda_train.report.tables import plain_table

    if args.hf is not None:
        subject = open_folder(args.hf, device=args.device, trust_remote_code=args.trust_remote_code)
    elif args.checkpoint is not None:
        subject = open_checkpoint(args.checkpoint, device=args.device)
    else:
        subject = open_run(args.run, step=args.step, device=args.device)
    with TerminalDisplay() as display:
        results, comparisons = evaluate_tasks(
            subject,
            [name for name in args.tasks.split(",") if name],
            task_dir=args.task_dir,
            limit=args.limit,
            compare=[name for name in args.compare.split(",") if name],
            contamination=args.contamination,
            batch_tokens=args.batch_tokens,
            display=display,
        )
    lines = [f"{subject.name}, on {results['device']} in {results['seconds']:.1f} s"]
    lines += plain_table(table(results["tasks"]))
    for comparison in comparisons:
        lines += ["", *describe(comparison)]
    if comparisons:
        lines += ["", *footnotes()]
    trouble: OSError | ValueError | None = None  # told after the scores, which took their time
    try:
        if subject.run_dir is not None and args.limit is None:
            path, missing = record_in_run(results, subject.run_dir)
            lines += ["", f"Kept in {path}" + (f"; {missing}" if missing else "")]
        if args.write is not None:
            command = "uv run apps/evaluate.py " + shlex.join(sys.argv[1:])
            name = args.name or subject.name
            write_page(results, comparisons, args.write, name=name, command=command)
            lines += ["", f"Written: {args.write}"]
    except (OSError, ValueError) as error:
        trouble = error
    show("\n".join(lines), results, args.json)
    if trouble is not None:
        raise trouble
    return 0


if __name__ == "__main__":
    run_app(main)
