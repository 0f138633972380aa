"""Write a run's model, tokenizer and card as a folder that Hugging Face transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from matilda_train.app import run_app
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run --extra export apps/export.py --run runs/hero --out exports/hero
  uv run --extra export apps/export.py --run runs/hero --step 20000 --out exports/hero-20k \\
      --check-text docs/DATA.md

Nothing is written unless transformers' tokenizer and model agree with the run's own on real text.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--run", required=True, type=Path, help="run directory")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--step", type=int, help="checkpoint step (default: newest healthy one)")
    parser.add_argument("--check-text", type=Path, help="UTF-8 text to compare on (default: ours)")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    from matilda_train import RunDir

    RunDir.read(args.run)  # a mistake is named before torch loads, for seconds
    from matilda_train.export import CHECK_TEXT, export_run

    text = CHECK_TEXT if args.check_text is None else args.check_text.read_text(encoding="utf-8")
    difference = export_run(args.run, args.out, step=args.step, text=text)
    print(f"{args.out}: logits agree to {difference:.1e} of the largest")
    return 0


if __name__ == "__main__":
    run_app(main)
