"""Make one self-contained HTML file of a run, or of several beside each other."""

from __future__ import annotations

import argparse
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import run_app
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run apps/report.py runs/hero                    writes runs/hero/report.html
  uv run apps/report.py runs/a runs/b runs/c --out comparison.html

Open the file in any browser: it needs no network. A run may still be in progress. Exit codes: 0
written, 2 bad input.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--out", type=Path, help="file to write (report.html in the run, or here for several)"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    from matilda_train import goodput, write_report

    one = args.runs[0] if len(args.runs) == 1 else Path()
    out = write_report(args.runs, args.out or one / "report.html")
    for run in args.runs:
        print(f"{run}: {goodput(run).table()}")
    print(f"Report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_app(main)
