"""Write a run's model, tokenizer and card as a folder that Hugging Face transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.app import run_app
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run --extra export apps/export.py --run runs/quickstart --out exports/quickstart
  uv run --extra export apps/export.py --run runs/hero --step 20000 --out exports/hero-20k \\
      --check-text docs/DATA.md
  uv run --extra export apps/export.py --run runs/hero --out exports/hero --push-to-hub me/hero

Nothing is written unless transformers' tokenizer and model agree with the run's own on real text,
and nothing is uploaded that was not written. A repository that is made is private unless --public.
Exit codes: 0 done, 2 bad input, 4 no usable checkpoint, or the hub failed.
"""


def parse_arguments() -> argparse.Namespace:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run directory")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder")
    parser.add_argument(
        "--step", type=int, metavar="N", help="checkpoint to take (default: newest healthy one)"
    )
    parser.add_argument(
        "--check-text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text on which tokens and logits must agree (default: a built-in one)",
    )
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload it to the Hugging Face hub, too"
    )
    parser.add_argument("--public", action="store_true", help="a new repository is for all to see")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    from matilda_train import RunDir

    RunDir.read(args.run)  # a mistake is named before torch loads, for seconds
    from matilda_train.hub_upload import check_hub, upload_folder

    if args.push_to_hub:
        check_hub(args.push_to_hub)
    from matilda_train.export import CHECK_TEXT, export_run

    try:
        text = CHECK_TEXT if args.check_text is None else args.check_text.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(args.check_text)!r} is not UTF-8 text ({error}).") from None
    difference = export_run(args.run, args.out, step=args.step, text=text)
    print(f"{args.out}: logits agree to {difference:.1e} of the largest")
    if args.push_to_hub:
        print("uploading …")
        step = "newest step" if args.step is None else f"step {args.step}"
        address = upload_folder(
            args.out, args.push_to_hub, private=not args.public, message=f"{args.run.name}, {step}"
        )
        print(address)
    return 0


if __name__ == "__main__":
    run_app(main)
