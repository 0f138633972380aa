"""Prepare the SmolLM corpus as token shards: `prepare_smollm.py --out-dir data/smollm_mix`.

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
from matilda_data.blobs import SOFTWARE_HERITAGE

DATASET = "HuggingFaceTB/smollm-corpus"
EXIT_STOPPED = 75  # the launcher should run it again
REVISION = "3ba9d605774198c5868892d7a8deda78031a781f"
MIXES = {
    "83/17": {"fineweb-edu-dedup": 83, "cosmopedia-v2": 17},
    "75/15/10": {"fineweb-edu-dedup": 75, "cosmopedia-v2": 15, "python-edu": 10},
}


def parse_mix(text: str) -> dict[str, int]:
    """`83/17`, `75/15/10`, or `NAME=WEIGHT,…` with names of the corpus's configurations."""
    if text in MIXES:
        return MIXES[text]
    try:
        pairs = [item.split("=") for item in text.split(",")]
        return {name: int(weight) for name, weight in pairs}
    except ValueError:
        raise DataError(
            f"`--mix` is {text!r}; give {', '.join(MIXES)} or NAME=WEIGHT,… such as "
            "fineweb-edu-dedup=9,cosmopedia-v2=1"
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out-dir", type=Path, required=True, help="directory of the data set")
    parser.add_argument("--target-tokens", type=int, default=15_000_000_000, help="training tokens")
    parser.add_argument("--mix", default="83/17", help="83/17, 75/15/10 or NAME=WEIGHT,…")
    parser.add_argument("--dataset", default=DATASET, help="repository on the hub")
    parser.add_argument("--revision", default=REVISION, help="commit, or a branch to pin now")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2 or byte")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    parser.add_argument("--val-fraction", type=float, default=0.001)
    parser.add_argument("--workers", type=int, help="processes; default: one a CPU")
    parser.add_argument("--runner", default="local", help="local or ray")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sources = [
            HubSource(
                name=name,
                dataset=options.dataset,
                config=name,
                revision=options.revision,
                weight=weight,
                blob_url=SOFTWARE_HERITAGE if name == "python-edu" else "",
            )
            for name, weight in parse_mix(options.mix).items()
        ]
        manifest = prepare_hub(
            sources,
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
        "next: uv run apps/train.py --config configs/base_152m_v2.json "
        f"--data-dir {options.out_dir}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
