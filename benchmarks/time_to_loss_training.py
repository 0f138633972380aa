"""One system of `time_to_loss.py`, trained from scratch for its minutes on one device.

Ours is `matilda_train.train` itself; a peer's model, optimizer and schedule run in a loop of its
kind. Both return what the table needs: recipe, size, and the held-out loss against the seconds of
training, those of evaluations and of what came before the first step left out.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from time_to_loss_systems import parse_system
from time_to_loss_table import Curve, on_other_windows

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"hero": "base_152m_v2"}
STEADY = 0.98  # of the speed of the first steps: a GPU slows down as it warms
EVALUATED = 256  # held-out windows
FINGERPRINT = range(0, 102_400, 1_600)  # windows of training whose hash tells the order of all
MOMENTUM_STEPS = ("optim.momentum_warmup_steps", "optim.momentum_cooldown_steps")


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
        "recipe": f"configs/{config_path(parse_system(name)[0]).name}"
        + (f" with {' '.join(args.set)}" if args.set else "")
        + f", rate {config.optim.lr:g}, warm-up {config.optim.warmup_steps} steps",
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


def config_path(name: str) -> Path:
    return ROOT / "configs" / f"{CONFIGS.get(name, name)}.json"


def our_config(system: str, args: argparse.Namespace, **fields: Any) -> Any:
    """The config of a system's name, with what `--set`, its recipe and `fields` change, in turn."""
    from matilda_train.config_load import load_config

    name, recipe = parse_system(system)
    path = config_path(name)
    quick = []
    if args.quick:
        quick = ["model.vocab_size=320", "model.d_model=32", "model.n_layers=2", "model.n_heads=2"]
        quick += ["model.n_kv_heads=1", "model.head_dim=16", "model.max_seq_len=32"]
        quick += ["data.tokenizer=byte", "train.tokens_per_step=128", "train.micro_batch_size=4"]
        quick += ["train.compile=false", "train.device=cpu", "train.threads=1"]
    asked = ["train.total_steps=100000", *quick, *args.set]
    changed: dict[str, Any] = {}
    if recipe.tokens_per_step is not None:
        config = load_config(path, asked)
        sequences = max(1, recipe.tokens_per_step // config.seq_len)
        changed["train.tokens_per_step"] = recipe.tokens_per_step
        if config.train.micro_batch_size != "auto":
            changed["train.micro_batch_size"] = min(sequences, config.train.micro_batch_size)
        for rate in ("lr", "adamw_lr", "embedding_lr"):
            own = getattr(config.optim, rate)
            changed[f"optim.{rate}"] = own and recipe.rate * own
    given = [f"{key}={json.dumps(value)}" for key, value in (changed | fields).items()]
    return load_config(path, [*asked, *given])


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


def run_peer(system: str, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """A peer's model, optimizer and schedule in its loop, on our windows."""
    import torch
    from time_to_loss_peers import FOLDERS, PEERS, Shape

    from matilda_train.batches import BatchReader
    from matilda_train.build import token_byte_lengths
    from matilda_train.data_source import open_streams
    from matilda_train.distributed import Ranks
    from matilda_train.evaluation import evaluate

    name, recipe = parse_system(system)
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


def cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def board() -> str | None:
    """The beginning of the GPU's own number: boards of one kind differ by some percent."""
    import torch

    if not cuda():
        return None
    number = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return str(number)[:8] if number is not None else None
