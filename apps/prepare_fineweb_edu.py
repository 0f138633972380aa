"""Prepare FineWeb-Edu as token shards: `prepare_fineweb_edu.py --out-dir data/fineweb_edu`.

Reads files of a pinned revision from the Hugging Face hub, checks each against the hub's SHA-256,
and writes verified shards. Run the same command again after any interruption: it continues.
"""

from __future__ import annotations

from matilda_train.stop_signals import end_on_signals

end_on_signals()  # in the first line, until `run_preparation` handles them

import argparse
import sys

from matilda_data import HubSource, add_preparation_options, prepare_hub, run_preparation

DATASET = "HuggingFaceFW/fineweb-edu"
REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target-tokens", type=int, default=3_000_000_000, help="training tokens")
    parser.add_argument("--config", default="sample-10BT", help="configuration on the hub")
    parser.add_argument("--dataset", default=DATASET, help="repository on the hub")
    parser.add_argument("--revision", default=REVISION, help="commit, or a branch to pin now")
    add_preparation_options(parser, val_fraction=0.005)
    options = parser.parse_args()
    source = HubSource(
        name="fineweb-edu",
        dataset=options.dataset,
        config=options.config,
        revision=options.revision,
    )
    code = run_preparation(
        prepare_hub, options, sources=[source], target_tokens=options.target_tokens
    )
    if code == 0 and options.partition is None:
        train = "uv run apps/train.py --config configs/base_124m.json"
        print(f"Next: {train} --data-dir {options.out_dir}")
    return code


if __name__ == "__main__":
    sys.exit(main())
