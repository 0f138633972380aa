"""What the programs that prepare data share: options, signals, exit codes, the closing lines.

parser = argparse.ArgumentParser()
add_preparation_options(parser, val_fraction=0.01)
options = parser.parse_args()
sys.exit(run_preparation(prepare_text, options, inputs=options.input))
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matilda_data.errors import DataError
from matilda_data.manifest import SPLITS, Manifest
from matilda_data.terminal import ProgressLine
from matilda_data.tokenizer import TOKENIZERS
from matilda_data.worker import RUNNERS, STOP_SIGNALS

__all__ = ["add_preparation_options", "parse_weights", "run_preparation"]

EXIT_BAD_INPUT = 2
EXIT_ENVIRONMENT = 4
EXIT_STOPPED = 75  # a launcher should run the same command again

FULL = (errno.ENOSPC, errno.EDQUOT)
OF_DISK = (*FULL, errno.EFBIG, errno.EROFS, errno.EIO)


def add_preparation_options(parser: argparse.ArgumentParser, *, val_fraction: float) -> None:
    """Add what every preparation takes; `val_fraction` is the default of that option."""
    add = parser.add_argument
    add("--out-dir", type=Path, required=True, metavar="DIR", help="directory of the data set")
    add(
        "--tokenizer",
        choices=tuple(TOKENIZERS),
        default="gpt2",
        help="byte: 257 ids, gpt2: 50,257; both are built in (default: %(default)s)",
    )
    add(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens a shard, 2 bytes each (default: %(default)s)",
    )
    add(
        "--val-fraction",
        type=float,
        default=val_fraction,
        metavar="X",
        help="share of the documents that is held out (default: %(default)s)",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: one a core, as far as they are useful)",
    )
    add(
        "--runner",
        choices=RUNNERS,
        default="local",
        help="processes of this machine, or a Ray cluster's (default: %(default)s)",
    )
    add(
        "--decontaminate",
        nargs="+",
        metavar="FILE",
        default=[],
        help="evaluation sets (.jsonl, .jsonl.gz): documents that share 13 words in a row go",
    )
    add(
        "--partition",
        type=_partition,
        metavar="I/N",
        help="do part I (0 to N-1) of N only, for one of N machines",
    )
    add(
        "--merge",
        nargs="+",
        metavar="DIR",
        default=[],
        help="with the other options as before: join the --out-dir of all N parts",
    )


def run_preparation(
    prepare: Callable[..., Manifest],
    options: argparse.Namespace,
    *,
    following: str = "",
    **arguments: Any,
) -> int:
    """Call `prepare` with `arguments` and the shared `options`; returns the exit code.

    `following` is the command to give next, told where the data set is whole and has both splits.

    0 when done; with one sentence, 2 for bad input and 4 for an environment that failed (disk
    full); 75 when stopped by SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or SIGHUP (the terminal is gone),
    the last one not where it is ignored, as under `nohup`. After 4 and 75 the same command goes on.
    What nobody can read any more is not said, and changes no exit code.
    """
    code, lines, complaint = _prepare(prepare, options, following, arguments)
    for stream, text in ((sys.stdout, lines), (sys.stderr, complaint)):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            # Python would try again, and end with a code of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _prepare(
    prepare: Callable[..., Manifest],
    options: argparse.Namespace,
    following: str,
    arguments: Mapping[str, Any],
) -> tuple[int, str, str]:
    """The exit code, and what to say on standard output and standard error."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    command = "uv run " + shlex.join(sys.argv)
    try:
        manifest = prepare(
            out_dir=options.out_dir,
            tokenizer=options.tokenizer,
            shard_tokens=options.shard_tokens,
            val_fraction=options.val_fraction,
            workers=options.workers,
            runner=options.runner,
            decontaminate=options.decontaminate,
            partition=options.partition,
            merge=options.merge,
            progress=ProgressLine(),
            command=command,
            **arguments,
        )
    except DataError as error:
        return EXIT_BAD_INPUT, "", f"error: {_by_option(str(error), options)}\n"
    except OSError as error:
        return EXIT_ENVIRONMENT, "", f"error: {_failure(error, options.out_dir)}\n"
    except KeyboardInterrupt:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second one changes nothing any more
        return EXIT_STOPPED, "", "\nStopped; run the same command again to go on.\n"
    if options.partition is not None:
        index, count = options.partition
        return (
            0,
            f"Part {index} of {count} is done. When all are, join them with the same options and "
            "--merge DIR… instead of --partition.\n",
            "",
        )
    lines = "".join(
        f"{split}: {manifest.total_tokens(split):,} tokens of "
        f"{manifest.total_documents(split):,} documents\n"
        for split in SPLITS
    )
    lines += f"Data set: {options.out_dir} (data_id {manifest.data_id})\n"
    if manifest.total_documents("val") == 0:
        warning = (
            f"warning: {str(options.out_dir)!r} has no held-out text, which training needs; "
            "prepare it again with a larger `--val-fraction`, such as 0.1, into a new `--out-dir`\n"
        )
        return 0, lines, warning
    return 0, lines + (f"Next: {following}\n" if following else ""), ""


def _by_option(message: str, options: argparse.Namespace) -> str:
    """`message` with the arguments of Python named as the options that set them."""
    for name in vars(options):
        message = message.replace(f"`{name}`", f"`--{name.replace('_', '-')}`")
    return message


def _failure(error: OSError, out_dir: Path) -> str:
    """What failed, on which file or at least in which directory, and what to do."""
    where = error.filename or (out_dir if error.errno in OF_DISK else None)
    what = f"{error.strerror}: {str(where)!r}" if where and error.strerror else str(error)
    first = "free space there, then " if error.errno in FULL else ""
    return f"{what}; {first}run the same command again to go on"


def parse_weights(text: str) -> dict[str, int]:
    """`NAME=WEIGHT,…` as a mapping.

    Raises:
        DataError: anything else, or a name twice.
    """
    try:
        pairs = [(name, int(weight)) for name, weight in (p.split("=") for p in text.split(","))]
    except ValueError:
        raise DataError(f"{text!r} is not NAME=WEIGHT,… such as prose=83,code=17") from None
    if len(dict(pairs)) != len(pairs):
        raise DataError(f"{text!r} names a source twice")
    return dict(pairs)


def _partition(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    try:
        return int(index), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N such as 0/4") from None
