"""The console command `matilda-data`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matilda_data.errors import DataError
from matilda_data.manifest import SPLITS, read_manifest
from matilda_data.verify import verify

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `matilda-data`; 0 when all is well, 2 with one sentence on stderr when not."""
    parser = argparse.ArgumentParser(
        prog="matilda-data", description="Verify and describe token data sets."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="check a data set against its manifest")
    check.add_argument("--deep", action="store_true", help="hash every byte, not only headers")
    check.add_argument("data_dir", type=Path)
    info = commands.add_parser("info", help="what is in a data set")
    info.add_argument("data_dir", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "verify":
            _verify(options.data_dir, deep=options.deep)
        else:
            _info(options.data_dir)
    except DataError as error:
        print(f"matilda-data: {error}", file=sys.stderr)
        return 2
    return 0


def _verify(data_dir: Path, *, deep: bool) -> None:
    report = verify(data_dir, deep=deep)
    extent = f"{report.bytes_hashed / 1e6:.1f} MB hashed" if deep else "headers and lengths"
    print(
        f"ok: {report.shards} shards, {report.documents} documents, {report.tokens} tokens "
        f"({extent}, {report.seconds:.2f} s)\ndata_id {report.data_id}"
    )


def _info(data_dir: Path) -> None:
    manifest = read_manifest(data_dir)
    print(f"data_id    {manifest.data_id}")
    tokenizer = manifest.tokenizer
    print(f"tokenizer  {tokenizer['name']}, {tokenizer['vocab_size']} ids")
    for source in manifest.sources:
        for split in SPLITS:
            print(
                f"{source.name:<10} {split:<5} weight {source.weight}  "
                f"{source.tokens[split]:>13,} tokens  {source.documents[split]:>9,} documents  "
                f"{source.text_bytes[split] / 1e6:>10,.1f} MB text"
            )
    for shard in manifest.shards:
        print(f"{shard.file}  {shard.tokens:,} tokens  sha256 {shard.sha256}")


if __name__ == "__main__":
    sys.exit(main())
