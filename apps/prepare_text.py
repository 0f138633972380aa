"""Turn local text into a verified data set of token shards; rerunning continues or confirms."""

from __future__ import annotations

import argparse
from pathlib import Path

from matilda_train import EXIT_PREEMPTED, StopRequest
from matilda_train.app import run_app

EXAMPLES = """examples:
  uv run apps/prepare_text.py --input 'books/**/*.txt' --out-dir data/books --tokenizer gpt2
  uv run apps/prepare_text.py --input corpus-*.jsonl.zst --out-dir data/corpus --tokenizer gpt2
  uv run apps/train.py --config configs/base_124m.json --data-dir data/corpus

Input: .txt and .py (a document a file), .jsonl, .jsonl.zst (a document a line, field `text`),
.parquet (a document a row, column `text`), folders of these, and globs.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, nargs="+", metavar="GLOB", help="text to read")
    parser.add_argument("--out-dir", required=True, type=Path, help="where the data set goes")
    parser.add_argument("--tokenizer", choices=("gpt2", "byte"), default="gpt2", help="(gpt2)")
    parser.add_argument(
        "--shard-tokens", type=int, default=100_000_000, help="tokens per shard (100,000,000)"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.01, help="held-out share of documents (0.01)"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    return parser.parse_args()


def main() -> int:
    stop = StopRequest().install()
    args = parse_arguments()
    from matilda_train import TerminalDisplay
    from matilda_train.preparation import PreparationStoppedError, prepare_with_display

    with TerminalDisplay() as display:
        try:
            manifest = prepare_with_display(
                args.input,
                args.out_dir,
                stop=lambda: bool(stop),
                display=display,
                tokenizer=args.tokenizer,
                shard_tokens=args.shard_tokens,
                val_fraction=args.val_fraction,
                workers=args.workers,
            )
        except PreparationStoppedError as stopped:
            print(stopped)
            return EXIT_PREEMPTED
    for split in ("train", "val"):
        print(
            f"{split}: {manifest.total_tokens(split):,} tokens of "
            f"{manifest.total_documents(split):,} documents"
        )
    print(f"Data set: {args.out_dir} (data_id {manifest.data_id})")
    print(f"Next: uv run apps/train.py --config configs/base_124m.json --data-dir {args.out_dir}")
    return 0


if __name__ == "__main__":
    run_app(main)
