"""Prepare FineWeb-Edu as token shards.

Reads files of a pinned revision from the Hugging Face hub, checks each against the hub's SHA-256,
and writes verified shards. Run the same command again after any interruption: it continues.
"""

from __future__ import annotations

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.stop_signals import end_on_signals

end_on_signals()  # in the first line, until `run_preparation` handles them

import sys

from matilda_data import HubSource, add_preparation_options, prepare_hub, run_preparation
from matilda_train.arguments import TeachingParser

DATASET = "HuggingFaceFW/fineweb-edu"
REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"

EXAMPLES = """examples:
  uv run apps/prepare_fineweb_edu.py --out-dir data/fineweb_edu
  uv run apps/prepare_fineweb_edu.py --out-dir data/sample --target-tokens 50000000
  uv run apps/train.py --config configs/base_124m.json --data-dir data/fineweb_edu

Needs the network, and outside a checkout `pip install 'matilda-data[hub]'`. Exit codes: 0 done, 2
bad input, 4 disk or network failed, 75 stopped by a signal. After 4 and 75 give the same command
again: it goes on.
"""


def main() -> int:
    parser = TeachingParser(description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add(
        "--target-tokens",
        type=int,
        default=3_000_000_000,
        metavar="N",
        help="training tokens to stop at (default: %(default)s)",
    )
    add("--config", default="sample-10BT", help="the repository's subset (default: %(default)s)")
    add("--dataset", default=DATASET, help="repository on the hub (default: %(default)s)")
    add(
        "--revision", default=REVISION, help="commit, or a branch to pin now (default: %(default)s)"
    )
    add_preparation_options(parser, val_fraction=0.005)
    options = parser.parse_args()
    source = HubSource(
        name="fineweb-edu",
        dataset=options.dataset,
        config=options.config,
        revision=options.revision,
    )
    return run_preparation(
        prepare_hub,
        options,
        following=f"uv run apps/train.py --config configs/base_124m.json "
        f"--data-dir {options.out_dir}",
        sources=[source],
        target_tokens=options.target_tokens,
    )


if __name__ == "__main__":
    sys.exit(main())
