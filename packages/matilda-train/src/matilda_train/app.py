"""What the apps have in common: options of a run, a look before a long one, how each one ends."""

from __future__ import annotations

import argparse
import json
import os
import select
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from matilda_train.stop_signals import EXIT_PREEMPTED, StopRequest, say

if TYPE_CHECKING:
    from matilda_train.config import RunConfig
    from matilda_train.loop_state import TrainResult

__all__ = [
    "add_checkpoint_options",
    "add_data_option",
    "add_device_option",
    "add_json_option",
    "add_preflight_options",
    "add_run_options",
    "add_set_option",
    "check_request",
    "look_before",
    "run_app",
    "show",
    "train_and_tell",
]

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_ENVIRONMENT = 4

LONG_RUN_SECONDS = 3600.0


def add_run_options(parser: argparse.ArgumentParser, *, run_dir_help: str, set_help: str) -> None:
    """Options of every app that trains: where, on what data, overrides, and how long to save."""
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help=run_dir_help)
    add_data_option(parser)
    add_set_option(parser, set_help)
    parser.add_argument(
        "--grace-seconds",
        type=float,
        metavar="S",
        help="on SIGTERM, SIGINT, SIGUSR1 or SIGHUP save and stop, but end after S seconds in any "
        "case (default: however long the save takes)",
    )


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Options of every app that opens one checkpoint of a run: which, and on what device."""
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run directory")
    parser.add_argument(
        "--step", type=int, metavar="N", help="checkpoint to take (default: newest healthy one)"
    )
    add_device_option(parser)


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """`--data-dir`."""
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="prepared data set (default: `data.dir` of the config, or where the run began)",
    )


def add_set_option(parser: argparse.ArgumentParser, about: str) -> None:
    """`--set`."""
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="a.b=c", help=about
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N, or auto: a GPU where there is one (default: auto)",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """`--json`, which `show` understands."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the result as JSON: printed instead of the text, or written to FILE beside it",
    )


def show(text: str, result: object, json_to: str | None) -> None:
    """Print `text` or, as `--json` said, the JSON of `result`; or print one and write the other.

    Raises:
        OSError: the file cannot be written.
    """
    if json_to is None:
        print(text)
        return
    as_json = json.dumps(result, indent=1)
    if json_to == "-":
        print(as_json)
        return
    print(text)
    Path(json_to).parent.mkdir(parents=True, exist_ok=True)
    Path(json_to).write_text(as_json + "\n", encoding="utf-8")


def add_preflight_options(parser: argparse.ArgumentParser) -> None:
    """Options that `look_before` understands."""
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="only look whether the run would work, how long it takes and what it costs: data, "
        "memory (real steps), disk, time; exit 0 for yes, 2 for no; changes nothing",
    )
    parser.add_argument(
        "--no-preflight", action="store_true", help="do not look before a long run either"
    )
    parser.add_argument(
        "--deep", action="store_true", help="pre-flight: hash every byte of the data"
    )
    parser.add_argument(
        "--dollars-per-hour", type=float, metavar="X", help="pre-flight: the machine's price"
    )
    add_json_option(parser)


def look_before(
    config: RunConfig, run_dir: Path, args: argparse.Namespace, *, dry_run: bool
) -> int | None:
    """Exit code of a pre-flight that was asked for or says no; None to go on and train.

    Runs that should take over an hour are looked at unasked before they begin.
    """
    from matilda_train.preflight import estimate_seconds, run_preflight

    price = args.dollars_per_hour
    if price is not None and not 0 <= price <= 1e9:
        raise ValueError(f"`--dollars-per-hour` is {price:g}, but must be from 0 to 10^9.")
    if not args.preflight:
        new = not dry_run and not (run_dir / "run.json").exists()
        if args.no_preflight or not new or estimate_seconds(config) < LONG_RUN_SECONDS:
            return None
    report = run_preflight(
        config,
        run_dir=run_dir,
        data_dir=args.data_dir,
        dollars_per_hour=price,
        deep=args.deep,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        thorough=args.preflight,
        note=lambda text: say(f"{text}\n") if _is_main() else None,
    )
    if _is_main():
        if args.preflight or args.json is None:
            show(str(report), report.to_dict(), args.json)
        else:
            say(f"{report}\n")  # `--json` is of what follows
        sys.stdout.flush()
    if args.preflight or not report.ok:
        return 0 if report.ok else EXIT_BAD_INPUT
    return None


def check_request(config: RunConfig, run_dir: Path, data_dir: Path | None) -> None:
    """Raise `ValueError` where a run could not begin for its data, directory or batch; no torch.

    Reads headers and lengths only and changes nothing. A corpus that the run itself prepares is not
    looked at.
    """
    from matilda_train.data_source import choose_data_dir, makes_corpus, open_streams
    from matilda_train.run_dir import check_run_dir

    data_id = None
    if not makes_corpus(data_dir, config):
        data_id = open_streams(config, choose_data_dir(data_dir, config, run_dir))[0].data_id
    check_run_dir(run_dir, config, data_id=data_id)
    if config.train.micro_batch_size != "auto":
        config.grad_accum_steps(int(os.environ.get("WORLD_SIZE", "1")))


def train_and_tell(
    config: RunConfig,
    *,
    run_dir: Path,
    data_dir: Path | None,
    stop: StopRequest,
    dry_run: bool = False,
    note: str = "",
    json_to: str | None = None,
) -> int:
    """`train` with a progress display; says how it ended, and returns the exit code for that.

    From here on a signal is a request to save. `note` is said first; `json_to` is as `show`'s.
    """
    from matilda_train import TerminalDisplay, train

    stop.begin()
    with TerminalDisplay() as display:
        if note and _is_main():
            display.note(note)
        result = train(
            config,
            run_dir=run_dir,
            data_dir=data_dir,
            dry_run=dry_run,
            stop=lambda: bool(stop),
            display=display,
        )
    if _is_main():
        with suppress(OSError):  # nobody listens: the exit code tells
            as_json = asdict(result) | {"run_dir": str(result.run_dir)}
            show(_last_words(result, dry_run=dry_run), as_json, json_to)
            sys.stdout.flush()
    return EXIT_PREEMPTED if result.status == "preempted" else 0


def _last_words(result: TrainResult, *, dry_run: bool) -> str:
    if result.status == "preempted":
        return f"Stopped at step {result.step:,}; run the same command again to go on."
    if dry_run:
        return f"Dry run of {result.step:,} steps passed; nothing was kept."
    run_dir = shlex.quote(str(result.run_dir))  # the line is there to be pasted into a shell
    following = f"Next: uv run apps/generate.py --run {run_dir} --prompt 'def '"
    if result.status == "already_finished":
        if not any(Path(result.run_dir, "checkpoints").glob("step-*")):
            following = (
                "Its checkpoints are gone: bring them back to use the model, or train it again "
                "with another `--run-dir`."
            )
        return f"This run is complete: {result.step:,} steps in {result.run_dir}\n{following}"
    first, final = (
        "not finite" if bits is None else f"{bits:.4f}"
        for bits in (result.first_bits_per_byte, result.final_bits_per_byte)
    )
    return (
        f"\n{result.sample}\n\n"
        f"Held-out bits per byte: {first} at first, {final} after {result.step:,} steps.\n"
        f"Run: {result.run_dir}\n{following}"
    )


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def run_app(main: Callable[[], int]) -> None:
    """Exit with what `main` returns, or with the code of the error it raises.

    2: bad input (`ValueError`). 3: the loss diverged. 4: the environment failed (disk full,
    unreadable file, no valid checkpoint among those there, a kernel that computes wrongly, no
    memory left). Set `MATILDA_DEBUG=1` for tracebacks.
    """
    try:
        code = main()
    except Exception as error:
        known = 0 if isinstance(error, BrokenPipeError) and _is_unheard() else _exit_code(error)
        if known is None or os.environ.get("MATILDA_DEBUG") == "1":
            raise
        code = known
        if code != 0:
            say(f"error: {_sentence(error)}\n")
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Nobody takes it any more; Python would try again, and end with a code of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _is_unheard() -> bool:
    """Whether the reader of standard output, `head` perhaps, has had enough."""
    look = select.poll()
    look.register(1, 0)
    return bool(look.poll(0))


def _sentence(error: Exception) -> str:
    """An error of memory or the operating system with what to do; others say so themselves."""
    from matilda_train.errors import is_out_of_memory

    if is_out_of_memory(error):
        what = str(error).partition("\n")[0] or "Out of memory"
        return (
            f"{what}; the newest checkpoint stands: lower `train.micro_batch_size`, or let "
            "`auto` choose it, which changes no batch, or take a smaller model."
        )
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return str(error)
    return f"{error.strerror}: {error.filename!r}; mend that and give the same command again."


def _exit_code(error: Exception) -> int | None:
    from matilda_ckpt import CheckpointError
    from matilda_model import KernelMismatchError
    from matilda_train.errors import TrainingDivergedError, is_out_of_memory

    if isinstance(error, TrainingDivergedError):
        return EXIT_DIVERGED
    environment = CheckpointError | KernelMismatchError | OSError
    if isinstance(error, environment) or is_out_of_memory(error):
        return EXIT_ENVIRONMENT
    return EXIT_BAD_INPUT if isinstance(error, ValueError) else None
