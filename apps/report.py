"""Make one self-contained HTML file of a run, or of several beside each other."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import add_json_option, run_app, show
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run apps/report.py runs/quickstart
  uv run apps/report.py runs/a runs/b runs/c --out comparison.html
  uv run apps/report.py runs/quickstart --svg docs/loss.svg    # the loss, as a README shows it
  uv run apps/report.py runs/quickstart --json | jq '.[].goodput'

Open the file in any browser: it needs no network. A run may still be in progress. What is printed,
and --json, account for the run's time. Exit codes: 0 written, 2 bad input.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="page to write (default: report.html in the run, or here for several)",
    )
    parser.add_argument(
        "--svg", type=Path, metavar="FILE", help="also draw the loss alone, as a picture"
    )
    add_json_option(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    from matilda_train import draw_loss, goodput, write_report

    if args.svg is not None:
        draw_loss(args.runs, args.svg)
    one = args.runs[0] if len(args.runs) == 1 else Path()
    out = write_report(args.runs, args.out or one / "report.html")
    accounts = {str(run): goodput(run) for run in args.runs}
    lines = [f"{run}: {account.table()}" for run, account in accounts.items()]
    lines.append(f"Report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    result = {run: {"goodput": of.fraction, **asdict(of)} for run, of in accounts.items()}
    show("\n".join(lines), result, args.json)
    return 0


if __name__ == "__main__":
    run_app(main)
