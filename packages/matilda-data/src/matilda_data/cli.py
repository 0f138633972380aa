"""The console command `matilda-data`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from matilda_data.archive import compress_dataset
from matilda_data.arguments import TeachingParser
from matilda_data.convert import export_bin, import_bin
from matilda_data.durable import write_durably
from matilda_data.errors import DataError
from matilda_data.manifest import SPLITS, read_manifest
from matilda_data.overlap import measure_overlap
from matilda_data.provenance import documents_of
from matilda_data.stream import BinStream, batch_sha256
from matilda_data.terminal import CountLine
from matilda_data.verify import verify

__all__ = ["main"]

EXAMPLES = """examples:
  matilda-data verify --deep data/corpus && echo intact
  matilda-data info data/corpus --json | jq '.sources[].weight'
  matilda-data trace data/corpus --step 100 --batch-size 256 --seq-len 2048 --seed 0 --text
  matilda-data overlap --evals data/evals/* --data-dir data/corpus --json overlap.json
  matilda-data convert fineweb_train_*.bin --val fineweb_val_*.bin --out-dir data/fineweb

Exit codes: 0 all is well, 2 not, in one sentence.
"""

SECONDS_BETWEEN = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `matilda-data`; 0 when all is well, 2 with one sentence on stderr when not."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` perhaps, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = TeachingParser(
        prog="matilda-data",
        description="Verify, describe, trace and convert token data sets.",
        epilog=EXAMPLES,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], None], text: str
    ) -> argparse._ArgumentGroup:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command.add_argument_group()

    check = add("verify", _verify, "check a data set against its manifest")
    check.add_argument("--deep", action="store_true", help="hash every byte, not only headers")
    where = "directory of the data set"
    check.add_argument("data_dir", type=Path, metavar="DIR", help=where)
    check.add_argument("--json", action="store_true", help="print JSON")
    info = add("info", _info, "what is in a data set")
    info.add_argument("data_dir", type=Path, metavar="DIR", help=where)
    info.add_argument("--json", action="store_true", help="print JSON")
    trace = add("trace", _trace, "which documents a sample, or a step's batch, is made of")
    trace.add_argument("data_dir", type=Path, metavar="DIR", help=where)
    trace.add_argument("--sample", type=int, metavar="N", help="global sample, counted from 0")
    trace.add_argument(
        "--step", type=int, metavar="N", help="or a step, counted from 0, with --batch-size"
    )
    trace.add_argument("--batch-size", type=int, metavar="N", help="samples of a global batch")
    trace.add_argument(
        "--seq-len", type=int, required=True, metavar="N", help="tokens of a sample, less one"
    )
    trace.add_argument("--seed", type=int, required=True, metavar="N", help="of the order")
    trace.add_argument("--split", choices=SPLITS, default="train", help="(default: train)")
    trace.add_argument("--text", action="store_true", help="print the text too")
    overlap = add("overlap", _overlap, "which items of evaluation sets are in the training text")
    overlap.add_argument(
        "--evals",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="evaluation sets, .jsonl or .jsonl.gz",
    )
    overlap.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="a prepared data set to look through"
    )
    overlap.add_argument(
        "--input", nargs="+", default=[], metavar="GLOB", help="or text: files, folders, globs"
    )
    overlap.add_argument("--split", choices=SPLITS, default="train", help="(default: train)")
    overlap.add_argument(
        "--json", type=Path, metavar="FILE", help="write what was found to FILE, with item ids"
    )
    convert = add("convert", _convert, "plain .bin shards to a data set with a manifest")
    convert.add_argument(
        "shards", nargs="+", type=Path, metavar="FILE", help="training shards in order"
    )
    convert.add_argument(
        "--val", nargs="+", type=Path, default=[], metavar="FILE", help="held-out shards"
    )
    convert.add_argument(
        "--out-dir", type=Path, required=True, metavar="DIR", help="directory of the new data set"
    )
    convert.add_argument(
        "--tokenizer", default="gpt2", help="that made the tokens: byte or gpt2 (default: gpt2)"
    )
    export = add("export-bin", _export, "a data set as plain llm.c shards")
    export.add_argument("data_dir", type=Path, metavar="DIR", help=where)
    export.add_argument(
        "--out-dir", type=Path, required=True, metavar="DIR", help="new directory of the shards"
    )
    compress = add("compress", _compress, "replace shards by .bin.zst; opening expands them")
    compress.add_argument("data_dir", type=Path, metavar="DIR", help=where)
    return parser


def _verify(options: argparse.Namespace) -> None:
    with CountLine("verified") as count:
        report = verify(options.data_dir, deep=options.deep, on_shard=count)
    if options.json:
        print(json.dumps(asdict(report), indent=2))
        return
    extent = f"{report.bytes_hashed / 1e6:.1f} MB hashed" if options.deep else "headers and lengths"
    print(
        f"ok: {report.shards} shards, {report.documents} documents, {report.tokens} tokens "
        f"({extent}, {report.seconds:.2f} s)\ndata_id {report.data_id}"
    )


def _info(options: argparse.Namespace) -> None:
    manifest = read_manifest(options.data_dir)
    if options.json:
        print(json.dumps({"data_id": manifest.data_id, **manifest.to_json()}, indent=2))
        return
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


def _trace(options: argparse.Namespace) -> None:
    if (options.sample is None) == (options.step is None):
        raise DataError("`trace` needs either --sample or --step")
    if options.step is not None and options.batch_size is None:
        raise DataError("`trace --step` needs --batch-size")
    stream = BinStream(
        options.data_dir, seq_len=options.seq_len, seed=options.seed, split=options.split
    )
    first, count = options.sample, 1
    if options.step is not None:
        first, count = options.step * options.batch_size, options.batch_size
    if first < 0 or count < 1:
        raise DataError("`trace` needs a sample or step from 0 on and a batch of 1 or more")
    digest = batch_sha256(stream.windows(first, count))
    print(f"samples {first} to {first + count - 1}, sha256 {digest}")
    for sample in range(first, first + count):
        for span in documents_of(stream, sample):
            origin = f" ({span.origin})" if span.origin else ""
            print(
                f"{sample} tokens {span.first}-{span.stop - 1}: {span.source} {span.id!r}{origin} "
                f"from its token {span.document_token}, {span.shard} at {span.shard_token}"
            )
            if options.text:
                print("    " + span.text.replace("\n", "\n    "))


def _overlap(options: argparse.Namespace) -> None:
    if options.json is not None and not options.json.parent.is_dir():
        # Said before hours of looking, not after them.
        raise DataError(f"cannot write {str(options.json)!r}: its directory does not exist")
    began, told = time.monotonic(), time.monotonic()

    def progress(share: float, documents: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < SECONDS_BETWEEN and share < 1:
            return
        told = now
        left = f", {(now - began) * (1 - share) / share:.0f} s left" if 0.01 < share < 1 else ""
        print(f"{100 * share:.0f} %, {documents:,} documents{left}", file=sys.stderr, flush=True)

    found = measure_overlap(
        options.evals,
        data_dir=options.data_dir,
        inputs=options.input,
        split=options.split,
        progress=progress,
    )
    if options.json is not None:
        write_durably(options.json, (json.dumps(found, indent=1) + "\n").encode())
    width = max(len(file["name"]) for file in found["files"])
    for file in found["files"]:
        short = file["items_too_short"]
        print(
            f"{file['name']:<{width}}  {file['items_found']:>6,} of {file['items']:,} items"
            + (f", {short:,} of them too short to be found" if short else "")
        )
    print(f"rule: {found['rule']}; {found['searched']['documents']:,} documents looked through")


def _convert(options: argparse.Namespace) -> None:
    manifest = import_bin(
        options.shards, options.out_dir, val=options.val, tokenizer=options.tokenizer
    )
    print(
        f"{options.out_dir}: {manifest.total_tokens('train'):,} tokens\ndata_id {manifest.data_id}"
    )


def _export(options: argparse.Namespace) -> None:
    for path in export_bin(options.data_dir, options.out_dir):
        print(path)


def _compress(options: argparse.Namespace) -> None:
    before, after = compress_dataset(options.data_dir)
    print(f"{before / 1e6:.1f} MB to {after / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
