"""Turn local text into a verified data set of token shards; rerunning continues or confirms."""

from __future__ import annotations

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.stop_signals import end_on_signals

end_on_signals()  # in the first line, until `run_preparation` handles them

import shlex
import sys

from matilda_data import (
    DataError,
    TextSource,
    add_preparation_options,
    parse_weights,
    prepare_text,
    run_preparation,
)
from matilda_train.arguments import TeachingParser

EXAMPLES = """examples:
  uv run apps/prepare_text.py --input 'packages/**/*.py' --out-dir data/own --tokenizer byte
  uv run apps/prepare_text.py --input 'books/**/*.txt' --out-dir data/books --tokenizer gpt2
  uv run apps/prepare_text.py --input corpus-*.jsonl.zst --out-dir data/corpus --tokenizer gpt2
  uv run apps/prepare_text.py --source prose=83 corpus-edu-*.jsonl.zst \\
      --source code=17 corpus-code-*.jsonl.zst --out-dir data/mix
  uv run apps/train.py --config configs/base_124m.json --data-dir data/corpus

Input: .txt and .py (a document a file), .jsonl, .jsonl.zst (a document a line, field `text`),
.parquet (a document a row, column `text`), folders of these, and globs. Exit codes: 0 done, 2 bad
input, 4 disk failed, 75 stopped by a signal. After 4 and 75 the same command goes on.
"""


def main() -> int:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", nargs="+", metavar="GLOB", help="files, folders or globs to read")
    what.add_argument(
        "--source",
        nargs="+",
        action="append",
        metavar=("NAME=WEIGHT", "GLOB"),
        help="one part of a mixture, by weight; give it once for each part",
    )
    add = parser.add_argument
    add("--exclude", nargs="+", metavar="PATTERN", default=[], help="files, folders to leave out")
    add("--text-field", default="text", metavar="NAME", help="key or column of the text (text)")
    add("--invalid-utf8", choices=("error", "replace"), default="error", help="replace: by U+FFFD")
    add_preparation_options(parser, val_fraction=0.01)
    options = parser.parse_args()
    try:
        inputs = options.input or [_source(*words) for words in options.source]
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = "base_124m" if options.tokenizer == "gpt2" else "quickstart"
    return run_preparation(
        prepare_text,
        options,
        following=f"uv run apps/train.py --config configs/{config}.json "
        f"--data-dir {shlex.quote(str(options.out_dir))} "
        f"--run-dir {shlex.quote(f'runs/{options.out_dir.name}')}",
        inputs=inputs,
        exclude=options.exclude,
        text_field=options.text_field,
        invalid_utf8=options.invalid_utf8,
    )


def _source(weight: str, *inputs: str) -> TextSource:
    weights = parse_weights(weight)
    if len(weights) != 1 or not inputs:
        raise DataError(f"`--source {weight}` needs one NAME=WEIGHT and then what to read")
    ((name, number),) = weights.items()
    return TextSource(name=name, weight=number, inputs=inputs)


if __name__ == "__main__":
    sys.exit(main())
