"""Prepare the SmolLM corpus as token shards.

Reads files of a pinned revision from the Hugging Face hub, checks each against the hub's SHA-256,
and writes verified shards. Run the same command again after any interruption: it continues. The
texts of Python-Edu are not in its rows: they come from Software Heritage, file by file.
"""

from __future__ import annotations

import _environment  # noqa: F401  (first: it names what is missing)
from matilda_train.stop_signals import end_on_signals

end_on_signals()  # in the first line, until `run_preparation` handles them

import sys

from matilda_data import (
    SOFTWARE_HERITAGE,
    DataError,
    HubSource,
    add_preparation_options,
    parse_weights,
    prepare_hub,
    run_preparation,
)
from matilda_train.arguments import TeachingParser

DATASET = "HuggingFaceTB/smollm-corpus"
REVISION = "3ba9d605774198c5868892d7a8deda78031a781f"
MIXES = {
    "83/17": "fineweb-edu-dedup=83,cosmopedia-v2=17",
    "75/15/10": "fineweb-edu-dedup=75,cosmopedia-v2=15,python-edu=10",
}

EXAMPLES = """examples:
  uv run apps/prepare_smollm.py --out-dir data/smollm_mix
  uv run apps/prepare_smollm.py --out-dir data/with_code --mix 75/15/10 --target-tokens 1000000000
  uv run apps/train.py --config configs/base_152m_v2.json --data-dir data/smollm_mix

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
        default=15_000_000_000,
        metavar="N",
        help="training tokens to stop at (default: %(default)s)",
    )
    add(
        "--mix",
        default="83/17",
        help="83/17 of FineWeb-Edu-dedup and Cosmopedia-v2, 75/15/10 with Python-Edu, or "
        "NAME=WEIGHT,… (default: %(default)s)",
    )
    add("--dataset", default=DATASET, help="repository on the hub (default: %(default)s)")
    add(
        "--revision", default=REVISION, help="commit, or a branch to pin now (default: %(default)s)"
    )
    add(
        "--blob-url",
        default=SOFTWARE_HERITAGE,
        metavar="URL",
        help="where Python-Edu's texts lie (default: %(default)s)",
    )
    add_preparation_options(parser, val_fraction=0.001)
    options = parser.parse_args()
    if "=" not in options.mix and options.mix not in MIXES:
        parser.error(f"--mix {options.mix!r} is neither {' nor '.join(MIXES)} nor NAME=WEIGHT,…")
    try:
        sources = [
            HubSource(
                name=name,
                dataset=options.dataset,
                config=name,
                revision=options.revision,
                weight=weight,
                blob_url=options.blob_url if name == "python-edu" else "",
            )
            for name, weight in parse_weights(MIXES.get(options.mix, options.mix)).items()
        ]
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_preparation(
        prepare_hub,
        options,
        following=f"uv run apps/train.py --config configs/base_152m_v2.json "
        f"--data-dir {options.out_dir}",
        sources=sources,
        target_tokens=options.target_tokens,
    )


if __name__ == "__main__":
    sys.exit(main())
