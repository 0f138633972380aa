"""Prepare FineWeb-Edu as token shards: `prepare_fineweb_edu.py --out-dir data/fineweb_edu`.

Streams files of a pinned revision from the Hugging Face hub, checks each against the hub's SHA-256,
and writes verified shards. Run the same command again after any interruption: it continues.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from matilda_data import DataError, HubSource, ProgressLine, prepare_hub

DATASET = "HuggingFaceFW/fineweb-edu"
EXIT_STOPPED = 75  # the launcher should run it again
REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out-dir", type=Path, required=True, help="directory of the data set")
    parser.add_argument("--target-tokens", type=int, default=3_000_000_000, help="training tokens")
    parser.add_argument("--config", default="sample-10BT", help="configuration on the hub")
    parser.add_argument("--dataset", default=DATASET, help="repository on the hub")
    parser.add_argument("--revision", default=REVISION, help="commit, or a branch to pin now")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2 or byte")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    parser.add_argument("--val-fraction", type=float, default=0.005)
    parser.add_argument("--workers", type=int, help="processes; default: one a CPU")
    parser.add_argument("--runner", default="local", help="local or ray")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        source = HubSource(
            name="fineweb-edu",
            dataset=options.dataset,
            config=options.config,
            revision=options.revision,
        )
        manifest = prepare_hub(
            [source],
            options.out_dir,
            target_tokens=options.target_tokens,
            tokenizer=options.tokenizer,
            shard_tokens=options.shard_tokens,
            val_fraction=options.val_fraction,
            workers=options.workers,
            runner=options.runner,
            progress=ProgressLine(),
            command="uv run " + shlex.join(sys.argv),
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped; run the same command again to go on.", file=sys.stderr)
        return EXIT_STOPPED
    tokens = {split: manifest.total_tokens(split) for split in ("train", "val")}
    print(
        f"{options.out_dir}: {tokens['train']:,} training and {tokens['val']:,} held-out tokens\n"
        f"data_id {manifest.data_id}\n"
        f"next: uv run apps/train.py --config configs/base_124m.json --data-dir {options.out_dir}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
