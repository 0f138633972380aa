"""Minutes of training to a held-out loss, beside nanoGPT's and nanochat's own code.

    python benchmarks/time_to_loss.py --data-dir DIR --out DIR --peer-dir DIR --minutes 8
    python benchmarks/time_to_loss.py --data-dir DIR --out DIR --systems hero:4 base_124m:3
    python benchmarks/time_to_loss.py --out DIR --table [--write docs/RESULTS.md]
    python benchmarks/time_to_loss.py --quick [--peer-dir DIR]     # toy shapes, a CPU, a minute

Each system trains from scratch for its minutes (`NAME:MINUTES`, else `--minutes`), its schedule as
long as they are, at the speed that its first steps show; so the time to a loss is asked of runs of
several lengths. All read the same windows of the same shards in the same order and are evaluated on
the same held-out windows by one function. The clock runs while training, with everything that the
system's loop does, and stands still while it is evaluated; what comes before, compiling above all,
is counted apart. Peers use their recipe for this size, at the sequence length of the others:
`time_to_loss_peers.py` says what that is. "hero" is `apps/train.py`'s loop with
`configs/base_152m_v2.json`, any other name that with `configs/NAME.json`, both with the overrides
of `--set`. Batches of half a million tokens make few steps of a few minutes: `NAME@65536` trains
with batches of so many tokens, ours or theirs, `NAME@65536x2` with twice the rates as well. The
target is the lowest last loss of any run of nanoGPT that was as long as its longest.

Every system is a process of its own, with `--gpus` several at once on a GPU each, and leaves
`OUT/NAME-MINUTES.json`; those that are there are not run again, with whatever `--set` they were
made. One that was cut off is run again from its beginning, compiling included: of minutes of
training, none can be gone on with.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from time_to_loss_systems import parse_system
from time_to_loss_table import describe
from time_to_loss_training import (
    board,
    cuda,
    data_identity,
    held_out_tokens,
    our_config,
    run_ours,
    run_peer,
)

from matilda_train.stop_signals import EXIT_PREEMPTED

BESIDES_SECONDS = 150  # of a system on a GPU: loading, compiling, the trial, its evaluations
KERNEL_PACKAGES = ("triton", "flash-attn-4", "quack-kernels", "liger-kernel", "kernels")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="prepared data set")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of our runs (OUT/runs)")
    parser.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME[@TOKENS][:MINUTES]",
        help="who trains, and for how long (nanogpt nanogpt@131072 nanochat hero@131072)",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="of training (%(default)s)")
    parser.add_argument(
        "--evaluate-every", type=float, default=20.0, metavar="S", help="seconds of training"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="for our configs")
    parser.add_argument("--peer-dir", type=Path, help="folder of public peer checkouts")
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="systems at once, a GPU each (%(default)s)"
    )
    parser.add_argument(
        "--stop-after",
        type=float,
        default=math.inf,
        metavar="S",
        help="begin no system that would not end within S seconds; 75 then says: run it again",
    )
    parser.add_argument("--quick", action="store_true", help="toy shapes; under a minute")
    parser.add_argument("--json", type=Path, help="also write all results here")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.quick and not args.child:
            args.out = args.out or Path(folder) / "out"
            args.data_dir = args.data_dir or quick_data(Path(folder))
            args.minutes, args.evaluate_every = 0.05, 0.5
            args.systems = args.systems or [
                "hero", *(["nanogpt", "nanogpt@256", "nanochat"] if args.peer_dir else [])
            ]  # fmt: skip
        args.systems = args.systems or ["nanogpt", "nanogpt@131072", "nanochat", "hero@131072"]
        if args.out is None or (args.data_dir is None and not args.table):
            parser.error("give --data-dir and --out, or --quick, or --out and --table")
        args.out.mkdir(parents=True, exist_ok=True)
        if args.child:
            return child(args)
        try:
            failed, left = ([], []) if args.table else run_all(args)
        except KeyboardInterrupt:
            print("time_to_loss.py: stopped; run it again for what had not ended", file=sys.stderr)
            return EXIT_PREEMPTED
        results = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
        text = describe(results)
        print(text)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        if args.write:
            from matilda_train.report.section import replace_section

            title = "## Time to a held-out loss"
            replace_section(args.write, "time to loss", f"{title}\n\n{text}", title="Results")
        for name in failed:
            print(f"time_to_loss.py: {name} failed", file=sys.stderr)
        for name in left:
            print(f"time_to_loss.py: no time for {name}, run it again", file=sys.stderr)
        return 1 if failed else EXIT_PREEMPTED if left else 0


def run_all(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Run what is missing, each in a process and on a GPU of its own; the names that failed, and
    those that would not have ended in time."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the children as well
    waiting = [wanted for system in args.systems if (wanted := missing(system, args))]
    for wanted in waiting:
        check(wanted.partition(":")[0], args)
    free = devices(args.gpus)
    alone = len(free) == 1 or len(waiting) == 1
    running: dict[str, tuple[str | None, subprocess.Popen[bytes]]] = {}
    failed, left = [], []
    # A dead child's compilers may still write: that is no reason to print no table.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        try:
            while waiting or running:
                while waiting and free:
                    wanted = waiting.pop(0)
                    seconds = 60 * float(wanted.partition(":")[2]) + BESIDES_SECONDS
                    if time.monotonic() - began + seconds > args.stop_after:
                        left.append(wanted)
                        continue
                    device = free.pop(0)
                    process = begin(wanted, args, device, Path(caches), alone=alone)
                    running[wanted] = device, process
                for wanted, (device, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[wanted]
                    free.append(device)
                    if process.returncode:
                        failed.append(wanted)
                    else:
                        result_path(args.out, wanted).with_suffix(".begun").unlink()
                time.sleep(0.1)
        finally:
            if running:  # a second signal would leave some of them behind
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            for _, process in running.values():
                process.kill()
                process.wait()
    return failed, left


def check(name: str, args: argparse.Namespace) -> None:
    """Exit naming what a system lacks, before another one trains for minutes."""
    from time_to_loss_peers import FOLDERS, PEERS, Shape

    try:
        peer, recipe = parse_system(name)
        config = our_config("hero" if peer in PEERS else name, args)
        held_out_tokens(args.data_dir, config)
        if peer not in PEERS:
            if config.train.micro_batch_size != "auto":
                config.grad_accum_steps(1)
            return
        PEERS[peer].batch(Shape(config.model.vocab_size, config.seq_len, args.quick), recipe)
        if args.peer_dir is None or not (args.peer_dir / FOLDERS[peer]).is_dir():
            raise ValueError(f"`--peer-dir` has no checkout {FOLDERS[peer]!r}, for {name}.")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


def missing(system: str, args: argparse.Namespace) -> str:
    """`NAME:MINUTES` of a system that is still to be run, or nothing."""
    name, _, minutes = system.partition(":")
    wanted = f"{name}:{float(minutes or args.minutes):g}"
    path = result_path(args.out, wanted)
    if not path.exists():
        return wanted
    if json.loads(path.read_text())["data_id"] != data_identity(args.data_dir):
        raise SystemExit(f"error: {path} is of another data set; choose another --out")
    print(f"{path} is there: {wanted} is not run again", file=sys.stderr)
    return ""


def devices(gpus: int) -> list[str | None]:
    """`CUDA_VISIBLE_DEVICES` of the systems at work; None leaves it as it is."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(gpus)]
    if not 1 <= gpus <= len(names):
        raise SystemExit(f"error: --gpus is {gpus}, but there are {len(names)}: {visible}")
    return [None] if gpus == 1 else list(names[:gpus])


def begin(
    wanted: str, args: argparse.Namespace, device: str | None, caches: Path, *, alone: bool
) -> subprocess.Popen[bytes]:
    """A process that trains one system; it holds the lock on that system's result."""
    begun = result_path(args.out, wanted).with_suffix(".begun")
    before = begun.exists()
    with begun.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"error: a process still trains {wanted}; end it first") from None
        if before:
            print(f"{wanted} was begun and cut off: it is run anew, from 0", file=sys.stderr)
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        if not cuda():
            environment["TORCHDYNAMO_DISABLE"] = "1"  # nanochat compiles its optimizer anywhere
        # What another system, or this one before it was cut off, has compiled starts no other.
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(caches / begun.stem / "inductor")
        environment["TRITON_CACHE_DIR"] = str(caches / begun.stem / "triton")
        command = [sys.executable, __file__, "--child", wanted, "--out", str(args.out)]
        command += ["--data-dir", str(args.data_dir), *["--quick"] * args.quick]
        command += ["--evaluate-every", str(args.evaluate_every)]
        command += ["--peer-dir", str(args.peer_dir)] if args.peer_dir else []
        command += ["--work", str(args.work)] if args.work else []
        command += ["--set", *args.set] if args.set else []
        command += [] if alone else ["--gpus", str(args.gpus)]
        # The child inherits the lock: an orphan's minutes and result are nobody else's.
        return subprocess.Popen(command, env=environment, pass_fds=[lock.fileno()])


def result_path(out: Path, system: str) -> Path:
    return out / f"{system.replace(':', '-')}.json"


def child(args: argparse.Namespace) -> int:
    """Train one system and write its curve."""
    import torch
    from time_to_loss_peers import PEERS

    from matilda_train.provenance import collect_provenance, package_version

    name, _, minutes = args.child.partition(":")
    seconds = 60 * float(minutes)
    found = collect_provenance(torch.device("cuda" if cuda() else "cpu"))
    kept = ("git_sha", "device", "cuda", "python")
    environment = {key: found[key] for key in kept} | {"torch": torch.__version__}
    versions = {package: package_version(package) for package in KERNEL_PACKAGES}
    environment["kernels"] = {key: value for key, value in versions.items() if value is not None}
    run = run_peer if parse_system(name)[0] in PEERS else run_ours
    result = {"system": name, "minutes": float(minutes)} | run(name, seconds, args)
    result["environment"] = environment
    result["board"] = board()
    result["systems_at_once"] = args.gpus
    given_folders = (args.data_dir, args.out, args.peer_dir, args.work)
    folders = {str(p): p.name for p in given_folders if p is not None}
    given = ["--systems" if word == "--child" else folders.get(word, word) for word in sys.argv[1:]]
    result["command"] = "python benchmarks/time_to_loss.py " + shlex.join(given)
    path = result_path(args.out, args.child)
    path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".tmp").rename(path)
    return 0


def quick_data(folder: Path) -> Path:
    """Bytes of this file, forty times."""
    from matilda_data import prepare_text

    source = folder / "text"
    source.mkdir()
    for i in range(40):
        (source / f"{i}.txt").write_text(Path(__file__).read_text()[i:])
    prepare_text(source, folder / "data", tokenizer="byte", val_fraction=0.1, workers=1)
    return folder / "data"


if __name__ == "__main__":
    sys.exit(main())
