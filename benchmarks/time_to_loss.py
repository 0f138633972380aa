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
`time_to_loss_peers.py` says what that is, and what `nanogpt@131072` is: its batch of half a million
tokens makes few steps of a few minutes, and a smaller one is fairer to it. The target is the lowest
loss of any run of nanoGPT that was as long as its longest. "hero" is `apps/train.py`'s loop with
`configs/base_152m_v2.json`, any other name that with `configs/NAME.json`, both with the overrides
of `--set`.

Every system is a process of its own, with `--gpus` several at once on a GPU each, and leaves
`OUT/NAME-MINUTES.json`; those that are there are not run again, with whatever `--set` they were
made. One that was cut off is run again from its beginning, compiling included: of minutes of
training, none can be gone on with.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from time_to_loss_table import Curve, describe, on_other_windows

from matilda_train.stop_signals import EXIT_PREEMPTED

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"hero": "base_152m_v2"}
STEADY = 0.98  # of the speed of the first steps: a GPU slows down as it warms
EVALUATED = 256  # held-out windows
BESIDES_SECONDS = 150  # of a system on a GPU: loading, compiling, the trial, its evaluations
KERNEL_PACKAGES = ("triton", "flash-attn-4", "quack-kernels", "liger-kernel", "kernels")
FINGERPRINT = range(0, 102_400, 1_600)  # windows of training whose hash tells the order of all
MOMENTUM_STEPS = ("optim.momentum_warmup_steps", "optim.momentum_cooldown_steps")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="prepared data set")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of our runs (OUT/runs)")
    parser.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME[:MINUTES]",
        help="who trains, and for how long (nanogpt nanogpt@131072 nanochat hero)",
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
        args.systems = args.systems or ["nanogpt", "nanogpt@131072", "nanochat", "hero"]
        if args.out is None or (args.data_dir is None and not args.table):
            parser.error("give --data-dir and --out, or --quick, or --out and --table")
        args.out.mkdir(parents=True, exist_ok=True)
        if args.child:
            return child(args)
        failed, left = ([], []) if args.table else run_all(args)
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
            for _, process in running.values():
                process.kill()
                process.wait()
    return failed, left


def check(name: str, args: argparse.Namespace) -> None:
    """Exit naming what a system lacks, before another one trains for minutes."""
    from time_to_loss_peers import FOLDERS, PEERS, Shape, parse_peer

    try:
        peer, recipe = parse_peer(name)
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


def cuda() -> bool:
    import torch

    return torch.cuda.is_available()


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
    run = run_peer if name.partition("@")[0] in PEERS else run_ours
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


def board() -> str | None:
    """The beginning of the GPU's own number: boards of one kind differ by some percent."""
    import torch

    if not cuda():
        return None
    number = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return str(number)[:8] if number is not None else None


def our_config(name: str, args: argparse.Namespace, **fields: Any) -> Any:
    from matilda_train.config_load import load_config

    path = ROOT / "configs" / f"{CONFIGS.get(name, name)}.json"
    quick = []
    if args.quick:
        quick = ["model.vocab_size=320", "model.d_model=32", "model.n_layers=2", "model.n_heads=2"]
        quick += ["model.n_kv_heads=1", "model.head_dim=16", "model.max_seq_len=32"]
        quick += ["data.tokenizer=byte", "train.tokens_per_step=128", "train.micro_batch_size=4"]
        quick += ["train.compile=false", "train.device=cpu", "train.threads=1"]
    given = [f"{key}={json.dumps(value)}" for key, value in fields.items()]
    return load_config(path, ["train.total_steps=100000", *quick, *args.set, *given])


def run_ours(name: str, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """`matilda_train.train` twice: a few steps for their speed, then the run itself."""
    from matilda_train import SilentDisplay, TerminalDisplay, train
    from matilda_train.config_load import config_to_dict
    from matilda_train.duration import Duration
    from matilda_train.metrics_log import read_rows

    work = (args.work or args.out / "runs") / args.child.replace(":", "-")
    shutil.rmtree(work, ignore_errors=True)
    base = our_config(name, args)
    tokens = held_out_tokens(args.data_dir, base)
    common: dict[str, Any] = {"eval.tokens": tokens, "eval.sample_tokens": 0}
    common |= {"ckpt.every_steps": 1_000_000, "train.spike_warmup_steps": 100}
    trial: dict[str, Any] = dict.fromkeys(MOMENTUM_STEPS, 0)
    trial |= dict.fromkeys(("train.batch_ramp", "train.seq_len_ramp"), ())
    trial |= {"train.total_steps": 12, "optim.warmup_steps": 1, "log.every_steps": 1}
    trial |= {"eval.every_steps": 1_000_000}
    config = our_config(name, args, **common, **trial)
    windows = windows_read(our_config(name, args, **common), args)
    train(config, run_dir=work / "trial", data_dir=args.data_dir, display=SilentDisplay())
    rows = read_rows(work / "trial" / "metrics.jsonl")
    cold, _ = our_clock(rows, config.plan.tokens)
    cold -= sum(row["eval_seconds"] for row in rows if row["step"] == 0)
    step_seconds = statistics.median([row["step_ms"] for row in rows if "step_ms" in row][2:]) / 1e3
    shutil.rmtree(work / "trial" / "checkpoints", ignore_errors=True)
    release_memory()
    tokens_in_time = int(STEADY * seconds * config.train.tokens_per_step / step_seconds)
    steps = max(20, base.plan.step_at(Duration(tokens_in_time, "tokens")))
    fields = {
        "train.total_steps": steps,
        "optim.warmup_steps": min(base.optim.warmup_steps, max(1, steps // 20)),
        "eval.every": f"{args.evaluate_every} s",
        "log.every_steps": 5,
    }
    for field in MOMENTUM_STEPS:  # as the config has them, where the run is long enough
        fields[field] = min(getattr(base.optim, field.partition(".")[2]), steps // 2)
    config = our_config(name, args, **common, **fields)
    with TerminalDisplay() as display:
        train(config, run_dir=work / "run", data_dir=args.data_dir, display=display)
    start, curve = our_clock(read_rows(work / "run" / "metrics.jsonl"), config.plan.tokens)
    shutil.rmtree(work / "run" / "checkpoints", ignore_errors=True)
    return {
        "recipe": f"configs/{CONFIGS.get(name, name)}.json"
        + (f" with {' '.join(args.set)}" if args.set else "")
        + f", warm-up {config.optim.warmup_steps} steps",
        "config": config_to_dict(config),
        "n_params": config.model.n_params,
        "seq_len": config.seq_len,
        "tokens_per_step": config.train.tokens_per_step,
        "steps": steps,
        "start_seconds": cold,
        "warm_start_seconds": start,
        "curve": curve,
        "data_id": data_identity(args.data_dir),
        "windows": windows,
    }


def release_memory() -> None:
    """Forget the trial's graphs and memory: the run begins as a process of its own would."""
    import torch

    torch.compiler.reset()
    gc.collect()
    if cuda():
        torch.cuda.empty_cache()


def our_clock(rows: Sequence[dict[str, Any]], tokens_at: Any) -> tuple[float, Curve]:
    """Seconds before the first step, and the curve against the seconds of training since then.

    The clock is the process's own: it counts whatever the loop does between two evaluations.
    """
    steps = [row for row in rows if "step_ms" in row]
    evaluations = [row for row in rows if "eval_seconds" in row]
    first = steps[0]
    usual = statistics.median(row["step_ms"] for row in steps) / 1e3
    within = sum(e["eval_seconds"] for e in evaluations if 0 < e["step"] < first["step"])
    zero = first["uptime_seconds"] - first["step"] * usual - within
    curve, stood_still = [], 0.0
    for row in evaluations:
        if row["step"] == 0:
            seconds = 0.0
        else:
            stood_still += row["eval_seconds"]
            seconds = row["uptime_seconds"] - zero - stood_still
        curve.append(point(seconds, row["step"], tokens_at(row["step"]), row))
    return zero, curve


def point(seconds: float, step: int, tokens: int, evaluation: dict[str, Any]) -> dict[str, float]:
    return {
        "seconds": round(seconds, 3),
        "step": step,
        "tokens": tokens,
        "val_loss_nats": evaluation["val_loss_nats"],
        "val_bits_per_byte": evaluation["val_bits_per_byte"],
    }


def held_out_tokens(data_dir: Path, config: Any) -> int:
    """Tokens of held-out windows that every micro-batch divides, so that all see the same ones."""
    from matilda_train.data_source import open_streams

    windows = min(EVALUATED, open_streams(config, data_dir)[1].n_windows)
    whole = windows // 32 * 32 or 1 << (windows.bit_length() - 1)
    return int(whole * config.seq_len)


def windows_read(config: Any, args: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of all held-out windows and of one in 1,600 of training.

    Exits where a result in `--out` had others, before minutes go into what cannot be compared.
    """
    from matilda_train.data_source import open_streams

    stream, held_out = open_streams(config, args.data_dir)
    read = {
        "held_out": [held_out.windows(0, config.eval.tokens // config.seq_len)],
        "training": [stream.windows(number, 1) for number in FINGERPRINT],
    }
    found = {
        split: hashlib.sha256(b"".join(w.astype("<u2").tobytes() for w in windows)).hexdigest()
        for split, windows in read.items()
    }
    for path in sorted(args.out.glob("*.json")):
        if differing := on_other_windows([json.loads(path.read_text()), {"windows": found}]):
            raise SystemExit(
                f"error: {args.child} would be {' and '.join(differing)} other windows than "
                f"{path}; give all the same sequence length, `data.seed` and `data.mix`, or "
                "choose another --out"
            )
    return found


def data_identity(data_dir: Path) -> str:
    from matilda_data import open_dataset

    return str(open_dataset(data_dir, split="train").data_id)


def run_peer(system: str, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """A peer's model, optimizer and schedule in its loop, on our windows."""
    import torch
    from time_to_loss_peers import FOLDERS, PEERS, Shape, parse_peer

    from matilda_train.batches import BatchReader
    from matilda_train.build import token_byte_lengths
    from matilda_train.data_source import open_streams
    from matilda_train.distributed import Ranks
    from matilda_train.evaluation import evaluate

    name, recipe = parse_peer(system)
    commit = commit_of(args.peer_dir / FOLDERS[name])
    tokens = held_out_tokens(args.data_dir, our_config("hero", args))
    config = our_config("hero", args, **{"eval.tokens": tokens})
    windows = windows_read(config, args)
    began = time.monotonic()
    device = torch.device("cuda" if cuda() else "cpu")
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(1 if args.quick else torch.get_num_threads())
    shape = Shape(vocab_size=config.model.vocab_size, seq_len=config.seq_len, quick=args.quick)
    peer = PEERS[name](args.peer_dir, shape, device, recipe)
    stream, held_out = open_streams(config, args.data_dir)
    reader = BatchReader(
        stream.windows, batch_size=peer.sequences, pin_memory=device.type == "cuda"
    )
    lengths = token_byte_lengths(config)

    def step(number: int) -> None:
        batch = reader.read(number * peer.sequences)
        peer.step(number, batch.micro_batches(peer.micro_batch, device))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def timed_step(number: int) -> float:
        start = time.perf_counter()
        step(number)
        wait()
        return time.perf_counter() - start

    def look(clock: float, number: int) -> dict[str, float]:
        found = evaluate(
            peer.evaluated(),
            held_out,
            max_tokens=tokens,
            seq_len=config.seq_len,
            micro_batch_size=peer.micro_batch,
            token_bytes=lengths,
            device=device,
            ranks=Ranks(),
        )
        assert found is not None
        print(
            f"{system}: step {number:,} of {steps:,}, {clock / 60:.1f} of {seconds / 60:g} min, "
            f"held-out loss {found.val_loss_nats:.4f} nats",
            file=sys.stderr,
            flush=True,
        )
        return point(clock, number, number * peer.tokens_per_step, vars(found))

    initial = {key: value.clone() for key, value in peer.model.state_dict().items()}
    peer.start(1000)
    timed_step(0)
    start_seconds = time.monotonic() - began
    durations = [timed_step(number) for number in range(1, 9)]
    steps = max(20, int(STEADY * seconds / statistics.median(durations[2:])))
    peer.model.load_state_dict(initial)
    del initial
    peer.start(steps)
    curve, clock, due = [look(0.0, 0)], 0.0, args.evaluate_every
    began = time.perf_counter()
    for number in range(steps):
        step(number)
        if (number + 1) % peer.steps_between_waits == 0 or number == steps - 1:
            wait()
        passed = clock + time.perf_counter() - began
        if passed >= due or number == steps - 1:
            wait()
            clock += time.perf_counter() - began
            curve.append(look(clock, number + 1))
            due += args.evaluate_every * math.ceil((clock - due + 1e-9) / args.evaluate_every)
            wait()
            began = time.perf_counter()
    reader.close()
    return {
        "recipe": peer.recipe,
        "commit": commit,
        "n_params": sum(p.numel() for p in peer.model.parameters()),
        "seq_len": config.seq_len,
        "tokens_per_step": peer.tokens_per_step,
        "steps": steps,
        "start_seconds": start_seconds,
        "curve": curve,
        "data_id": stream.data_id,
        "windows": windows,
    }


def commit_of(folder: Path) -> str | None:
    """The checkout's commit: of git, or from a file COMMIT beside an archive's files."""
    if (folder / "COMMIT").is_file():
        return (folder / "COMMIT").read_text().strip()
    if not (folder / ".git").exists():  # or git would name the repository around it
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


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
