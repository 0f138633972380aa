"""Score a run, a checkpoint or a transformers folder on question sets."""

from __future__ import annotations

import argparse
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import run_app
from matilda_train.arguments import TeachingParser

TASKS = "hellaswag,arc_easy,piqa,lambada_openai,sciq,winogrande"
EXAMPLES = f"""examples:
  uv run apps/evaluate.py --run runs/hero --task-dir data/evals --compare pythia-160m,pythia-410m
  uv run apps/evaluate.py --run runs/hero --step 4000 --tasks hellaswag,piqa --task-dir data/evals
  uv run --extra eval apps/evaluate.py --run runs/hero --tasks arc_challenge,lambada_openai
  uv run --extra eval apps/evaluate.py --hf exports/hero --trust-remote-code --task-dir data/evals

Tasks are files of `--task-dir` (`TASK_SPLIT.jsonl` or `.jsonl.gz`) or, without it, tasks of
lm-evaluation-harness, which loads their data from the Hugging Face hub. Default tasks:
{TASKS}.
What of them is in the training text is measured for `--contamination` by
  uv run matilda-data overlap --evals data/evals/* --data-dir data/corpus --json overlap.json

A run's scores are kept in it, as `evals/step-XXXXXXXX.json` and as a row of `metrics.jsonl`, unless
`--limit` is given. Exit codes: 0 done, 2 bad input, 4 no usable checkpoint.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="run directory")
    what.add_argument("--checkpoint", type=Path, help="a `step-…` folder of a run's checkpoints")
    what.add_argument("--hf", type=Path, metavar="FOLDER", help="a folder of transformers")
    parser.add_argument("--step", type=int, help="of --run (default: newest healthy checkpoint)")
    parser.add_argument("--tasks", default=TASKS, help="names, with commas between them")
    parser.add_argument("--task-dir", type=Path, help="folder of task files")
    parser.add_argument("--limit", type=int, metavar="N", help="first N items of each task only")
    parser.add_argument("--compare", default="", metavar="MODELS", help="Pythias, by name")
    parser.add_argument("--contamination", type=Path, metavar="FILE", help="what overlaps")
    parser.add_argument("--batch-tokens", type=int, metavar="N", help="tokens run at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results here as well")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the folder's code")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    from matilda_train import RunDir, TerminalDisplay

    if args.run is not None:
        RunDir.read(args.run)  # a mistake is named before torch loads, for seconds
    from matilda_train.evals import evaluate_tasks, open_checkpoint, open_folder, open_run
    from matilda_train.evals.pythia import describe, footnotes
    from matilda_train.evals.results import record_in_run, table, write_results

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
    print(f"{subject.name}, on {results['device']} in {results['seconds']:.1f} s")
    print("\n".join(table(results["tasks"])))
    for comparison in comparisons:
        print("\n".join(["", *describe(comparison)]))
    if comparisons:
        print("\n".join(["", *footnotes()]))
    if args.json is not None:
        write_results(results, args.json)
    if subject.run_dir is not None and args.limit is None:
        path, missing = record_in_run(results, subject.run_dir)
        print(f"\nKept in {path}" + (f"; {missing}" if missing else ""))
    return 0


if __name__ == "__main__":
    run_app(main)
