"""Print the documents that the batch of one training step was made of."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import run_app
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run apps/trace.py --run runs/hero --step 18211
  uv run apps/trace.py --run runs/hero --step 18211 --data-dir data/smollm_mix --text
  uv run apps/trace.py --run runs/hero --step 18211 --json | jq '.documents[].id'
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--run", required=True, type=Path, help="run directory")
    parser.add_argument("--step", required=True, type=int, help="step, counted from 1")
    parser.add_argument("--data-dir", type=Path, help="prepared data set (default: data.dir)")
    parser.add_argument("--text", action="store_true", help="print the text too")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    from matilda_train.trace import trace_step

    trace = trace_step(args.run, args.step, data_dir=args.data_dir)
    if args.json:
        print(json.dumps(asdict(trace)))
        return 0
    agreed = {True: "as in the metrics", False: "NOT as in the metrics", None: "not in the metrics"}
    last = trace.first_sample + trace.samples - 1
    print(f"Step {trace.step:,}: samples {trace.first_sample:,} to {last:,}")
    print(f"Batch {trace.batch_sha256} ({agreed[trace.matches_metrics]})\n")
    print(f"{'sample':>10}  {'tokens':>11}  {'from token':>10}  {'source':16}  document")
    for row in trace.documents:
        tokens = f"{row['first']}-{row['stop'] - 1}"
        name = f"{row['id']} ({row['origin']})" if row["origin"] else row["id"]
        print(
            f"{row['sample']:>10}  {tokens:>11}  {row['document_token']:>10}  "
            f"{row['source']:16}  {name}"
        )
        if args.text:
            print("    " + row["text"].replace("\n", "\n    "))
    return 1 if trace.matches_metrics is False else 0


if __name__ == "__main__":
    run_app(main)
