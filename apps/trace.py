"""Print the documents that the batch of one training step was made of."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import add_data_option, add_json_option, run_app, show
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run apps/trace.py --run runs/quickstart --step 400
  uv run apps/trace.py --run runs/quickstart --step 400 --text | less
  uv run apps/trace.py --run runs/hero --step 18211 --json | jq '.documents[].id'

Exit codes: 0 done; 1 the batch is not the one that the run's metrics name; 2 bad input.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run directory")
    parser.add_argument("--step", required=True, type=int, metavar="N", help="counted from 1")
    add_data_option(parser)
    parser.add_argument("--text", action="store_true", help="print the text too")
    add_json_option(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    from matilda_train.trace import trace_step

    trace = trace_step(args.run, args.step, data_dir=args.data_dir)
    agreed = {
        True: "as in the metrics",
        False: "NOT as in the metrics",
        None: "not compared: metrics.jsonl has no row near enough from this step on",
    }
    last = trace.first_sample + trace.samples - 1
    lines = [
        f"Step {trace.step:,}: samples {trace.first_sample:,} to {last:,}",
        f"Batch {trace.batch_sha256} ({agreed[trace.matches_metrics]})\n",
        f"{'sample':>10}  {'tokens':>11}  {'from token':>10}  {'source':16}  document",
    ]
    for row in trace.documents:
        tokens = f"{row['first']}-{row['stop'] - 1}"
        name = f"{row['id']} ({row['origin']})" if row["origin"] else row["id"]
        lines.append(
            f"{row['sample']:>10}  {tokens:>11}  {row['document_token']:>10}  "
            f"{row['source']:16}  {name}"
        )
        if args.text:
            lines.append("    " + row["text"].replace("\n", "\n    "))
    show("\n".join(lines), asdict(trace), args.json)
    return 1 if trace.matches_metrics is False else 0


if __name__ == "__main__":
    run_app(main)
