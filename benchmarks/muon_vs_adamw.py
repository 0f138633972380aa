"""Muon against AdamW, each tuned with equal trials: steps to the same validation loss.

python benchmarks/muon_vs_adamw.py --data-dir DIR [--json FILE] [--steps N]
python benchmarks/muon_vs_adamw.py --quick          # toy model, bytes of this file, CPU, a minute

Both sides are `matilda_optim.Muon` over `param_groups` of one model with the same options but
`algorithm`: "adamw" puts every parameter under AdamW; "muon" puts the hidden matrices under Muon
and the rest under AdamW. One learning rate serves all groups of a trial (Muon's updates have
AdamW's RMS), gradients are clipped to norm 1, warm-up is 5 % and decay to zero is linear over the
whole run. Three parts:

1. every learning rate of LRS for both, first seed; while the best of either lies at an end of the
   grid, both try the next power of two there, four times at most;
2. the best of each again with two more seeds, so three;
3. Muon's best over shorter runs, the shortest first, three seeds: where it meets the mean final
   loss of AdamW.

A study that was stopped goes on: trials in FILE with the same settings are not run again.

DIR is a data set of `matilda_data`. Every run reads each window at most once, in the order of its
seed, which also draws the initial weights. The loss is the mean over the first validation windows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matilda_data import BinStream, prepare_text
from matilda_model import ModelConfig, Transformer
from matilda_optim import Muon, linear_to_zero, param_groups

LRS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
MAX_WIDER = 4
SEEDS = (0, 1, 2)
WEIGHT_DECAY = 0.1
GRAD_CLIP = 1.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one trial trains, and for how long."""

    model: ModelConfig
    steps: int
    batch: int
    """Windows of `model.max_seq_len` tokens in a step."""
    val_windows: int


FULL = Size(
    model=ModelConfig(
        vocab_size=50304,
        d_model=384,
        n_layers=8,
        n_heads=6,
        n_kv_heads=2,
        max_seq_len=512,
        mlp="relu2",
        mlp_ratio=4.0,
        logit_softcap=30.0,
    ),
    steps=500,
    batch=64,
    val_windows=512,
)
QUICK = Size(
    model=ModelConfig(
        vocab_size=320, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=64
    ),
    steps=40,
    batch=8,
    val_windows=8,
)


class Bench:
    """One compiled model whose weights every trial draws anew, and the data on the device."""

    def __init__(self, size: Size, data: Path, device: str) -> None:
        self.size = size
        self.data = data
        self.device = device
        with torch.device(device):
            self.model = Transformer(size.model)
        cuda = device == "cuda"
        if cuda:
            self.model.compute_dtype = torch.bfloat16
        self.compiled = torch.compile(self.model, fullgraph=True, dynamic=False, disable=not cuda)
        self._windows: dict[int, Tensor] = {}
        val = BinStream(data, seq_len=size.model.max_seq_len, seed=0, split="val", shuffle=False)
        count = min(size.val_windows, val.n_windows) // size.batch * size.batch
        self.val = self._upload(val, count)

    def _upload(self, stream: BinStream, count: int) -> Tensor:
        """int32 (count, T + 1) on the device."""
        return torch.from_numpy(stream.windows(0, count).astype("int32")).to(self.device)

    def windows(self, seed: int) -> Tensor:
        if seed not in self._windows:
            stream = BinStream(self.data, seq_len=self.size.model.max_seq_len, seed=seed)
            self._windows[seed] = self._upload(stream, self.size.steps * self.size.batch)
        return self._windows[seed]

    def loss(self, windows: Tensor) -> Tensor:
        tokens = windows.long()
        loss: Tensor = self.compiled(tokens[:, :-1], tokens[:, 1:]).loss
        return loss

    def validate(self) -> float:
        with torch.no_grad():
            losses = [self.loss(rows) for rows in torch.split(self.val, self.size.batch)]
        return float(torch.stack(losses).mean())

    def trial(self, algorithm: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
        """Trains from new weights; returns the settings, the loss curve and the final loss."""
        begin = time.perf_counter()
        self.model.init_weights(torch.Generator(self.device).manual_seed(seed))
        groups = param_groups(
            self.model, algorithm=algorithm, lr=lr, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95)
        )
        optimizer = Muon(groups)
        windows = self.windows(seed)
        warmup = max(1, steps // 20)
        curve: list[tuple[int, float]] = []
        for step in range(steps):
            if step % max(1, steps // 10) == 0:
                curve.append((step, self.validate()))
            for group in optimizer.param_groups:
                multiplier = linear_to_zero(step, total_steps=steps, warmup_steps=warmup)
                group["lr"] = group["initial_lr"] * multiplier
            rows = windows[step * self.size.batch : (step + 1) * self.size.batch]
            torch.autograd.backward(self.loss(rows))
            nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
            optimizer.step()
            optimizer.zero_grad()
        curve.append((steps, self.validate()))
        return {
            "algorithm": algorithm,
            "lr": lr,
            "seed": seed,
            "steps": steps,
            "loss": curve[-1][1],
            "curve": curve,
            "seconds": time.perf_counter() - begin,
        }


def meeting(points: list[tuple[int, float]], target: float) -> float:
    """The run length at which a falling loss, linear between `points`, meets `target`."""
    for (left, high), (right, low) in itertools.pairwise(points):
        if low <= target <= high:
            return left + (right - left) * (high - target) / (high - low)
    return float("nan")


def compare(bench: Bench, report: dict[str, Any], save: Callable[[], None]) -> None:
    """The three parts; `report["trials"]` and its summary are saved as they grow."""
    steps = bench.size.steps
    trials: list[dict[str, Any]] = report["trials"]

    def run(algorithm: str, lr: float, seed: int, length: int) -> float:
        wanted = {"algorithm": algorithm, "lr": lr, "seed": seed, "steps": length}
        for trial in trials:
            if wanted.items() <= trial.items():
                return float(trial["loss"])
        trial = bench.trial(algorithm, lr, seed, length)
        trials.append(trial)
        save()
        print(
            f"{algorithm:6} lr {lr:<7g} seed {seed} {length:5d} steps: "
            f"loss {trial['loss']:.4f}  ({trial['seconds']:.1f} s)",
            flush=True,
        )
        loss: float = trial["loss"]
        return loss

    grid = list(LRS)
    losses: dict[str, dict[float, float]] = {"adamw": {}, "muon": {}}
    best: dict[str, float] = {}
    for _ in range(1 + MAX_WIDER):
        for algorithm, known in losses.items():
            for lr in grid:
                if lr not in known:
                    known[lr] = run(algorithm, lr, SEEDS[0], steps)
            best[algorithm] = min(known, key=lambda lr: (math.isnan(known[lr]), known[lr]))
        lowest, highest = min(grid), max(grid)
        if lowest in best.values():
            grid.append(lowest / 2)
        elif highest in best.values():
            grid.append(highest * 2)
        else:
            break
    final = {
        algorithm: [known[best[algorithm]]]
        + [run(algorithm, best[algorithm], seed, steps) for seed in SEEDS[1:]]
        for algorithm, known in losses.items()
    }
    target = statistics.mean(final["adamw"])
    report |= {"best_lr": best, "final": final, "target": target}
    points: dict[int, list[float]] = {}
    for share in SHARES:
        length = round(steps * share)
        points[length] = [run("muon", best["muon"], seed, length) for seed in SEEDS]
        if max(points[length]) < min(final["adamw"]):
            break
    else:
        points[steps] = final["muon"]
    mean_curve = [(length, statistics.mean(losses)) for length, losses in points.items()]
    per_seed = [
        meeting([(n, losses[i]) for n, losses in points.items()], final["adamw"][i])
        for i in range(len(SEEDS))
    ]
    needed = meeting(mean_curve, target)
    report |= {"muon_by_length": points, "steps_needed": needed, "steps_needed_by_seed": per_seed}
    save()
    for algorithm, losses_of in final.items():
        spread = statistics.stdev(losses_of)
        mean = statistics.mean(losses_of)
        print(f"{algorithm}: {mean:.4f} ± {spread:.4f} at lr {best[algorithm]:g}, {steps} steps")
    by_seed = ", ".join(f"{n:.0f}" for n in per_seed)
    print(f"Muon meets AdamW's loss in {needed:.0f} of {steps} steps (by seed: {by_seed})")


def recorded_trials(file: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials in `file`, if it exists and was written under these settings."""
    if file is None or not file.exists():
        return []
    report = json.loads(file.read_text())
    trials: list[dict[str, Any]] = report["trials"]
    return trials if settings.items() <= report.items() else []


def quick_data(folder: Path) -> Path:
    source = folder / "text"
    source.mkdir()
    for i in range(40):
        (source / f"{i}.txt").write_text(Path(__file__).read_text()[i:])
    prepare_text(source, folder / "data", tokenizer="byte", val_fraction=0.1, workers=1)
    return folder / "data"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="data set directory of matilda_data")
    parser.add_argument("--quick", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--json", type=Path, help="write all trials to this file")
    parser.add_argument("--steps", type=int, help="of a full-length run, instead of the default")
    args = parser.parse_args()
    if args.quick == (args.data_dir is not None):
        parser.error("give either --data-dir DIR or --quick")
    size = QUICK if args.quick else FULL
    if args.steps:
        size = Size(**{**vars(size), "steps": args.steps})
    device = "cuda" if torch.cuda.is_available() and not args.quick else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(size, quick_data(Path(folder)) if args.quick else args.data_dir, device)
        report: dict[str, Any] = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "parameters": size.model.n_params,
            "tokens_a_step": size.batch * size.model.max_seq_len,
            "steps": size.steps,
            "weight_decay": WEIGHT_DECAY,
            "grad_clip": GRAD_CLIP,
        }
        report["trials"] = recorded_trials(args.json, report)

        def save() -> None:
            if args.json:
                args.json.write_text(json.dumps(report) + "\n")

        print(f"{report['device']}, {size.model.n_params:,} parameters", flush=True)
        compare(bench, report, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
