"""Pre-flight: would this run work, how long would it take and what would it cost?

Asked before the money is spent. Device, data, run directory, memory, disk and time are looked at,
memory and time by real steps of the model; nothing is written (but a deep look at the data leaves
its stamps, which save a second one).
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from matilda_ckpt import Checkpointer
from matilda_data import DataError, verify
from matilda_model import count_params, flops_per_token
from matilda_train.build import check_kernels
from matilda_train.config import RunConfig
from matilda_train.data_source import choose_data_dir, makes_corpus, open_streams
from matilda_train.distributed import Ranks
from matilda_train.evals.task_files import read_tasks
from matilda_train.hardware import choose_device, device_name, numerics, peak_flops
from matilda_train.micro_batch import CPU_MICRO_BATCH, describe_trial, sizes_that_divide
from matilda_train.provenance import package_version
from matilda_train.run_dir import check_run_dir
from matilda_train.trial_step import StepTrial, TrialRun, largest_that_fits

__all__ = ["Finding", "PreflightReport", "estimate_seconds", "run_preflight"]

ASSUMED_MFU = 0.35
FLOPS_OF_UNKNOWN_GPU = 50e12
FLOPS_OF_A_CPU_CORE = 25e9
TORCH_FROM, TORCH_BELOW = (2, 11), (2, 16)

Verdict = Literal["yes", "warn", "no"]


@dataclass(frozen=True)
class Finding:
    """What was found about one subject."""

    subject: str
    verdict: Verdict
    said: str
    """One line; for "no", the reason and what to do."""


@dataclass
class PreflightReport:
    """All findings, and the figures behind them with units in their names."""

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the run."""
        return all(finding.verdict != "no" for finding in self.findings)

    def add(self, subject: str, verdict: Verdict, said: str) -> None:
        """One more finding."""
        self.findings.append(Finding(subject, verdict, said))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        found = [asdict(finding) for finding in self.findings]
        return {"ok": self.ok, "findings": found, "figures": self.figures}

    def __str__(self) -> str:
        """A table for people, and the answer below it."""
        marks = {"yes": "ok", "warn": "note", "no": "NO"}
        width = max(len(finding.subject) for finding in self.findings)
        lines = [f"{f.subject:<{width}}  {marks[f.verdict]:<4}  {f.said}" for f in self.findings]
        reasons = [finding.subject for finding in self.findings if finding.verdict == "no"]
        answer = "yes, it can start" if self.ok else f"no: {', '.join(reasons)}"
        return "\n".join([*lines, f"Pre-flight: {answer}."])


def run_preflight(
    config: RunConfig,
    *,
    run_dir: str | Path,
    data_dir: str | Path | None = None,
    dollars_per_hour: float | None = None,
    deep: bool = False,
    world_size: int = 1,
    thorough: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> PreflightReport:
    """Look at everything that a run of `config` in `run_dir` needs; every reason is reported.

    What data or directory forbid is tried in real steps where `thorough` and on a GPU alone: on a
    CPU they take minutes. `deep` hashes every byte of the data. `dollars_per_hour` is the price of
    the whole machine. `note` hears when real steps begin, and of each trial of a micro-batch.
    Raises `ValueError` for a device that is not there.
    """
    report = PreflightReport()
    device = Ranks(local_rank=int(os.environ.get("LOCAL_RANK", "0"))).own_device(
        choose_device(config.train.device)
    )
    threads = config.train.threads
    with numerics(device, deterministic=config.train.deterministic, threads=threads):
        run_dir, data = Path(run_dir), choose_data_dir(data_dir, config, run_dir)
        _look_at_device(report, device)
        made = makes_corpus(data_dir, config)
        data_id = _look_at_data(report, config, data, made=made, deep=deep)
        _look_at_tasks(report, config)
        step = _look_at_run_dir(report, config, run_dir, data_id)
        trial = None
        if thorough or report.ok:
            steps = report.ok or device.type != "cpu"
            trial = _look_at_memory(report, config, device, world_size, note, steps=steps)
        _look_at_disk(report, config, run_dir, step)
        if trial is not None:
            _look_at_time(report, config, trial, step, world_size, dollars_per_hour, device)
    return report


def estimate_seconds(config: RunConfig) -> float:
    """A first guess at the duration of the whole run, from FLOPs alone and within a factor of 3."""
    device = choose_device(config.train.device)
    flops = flops_per_token(config.model, config.seq_len, causal=False)
    if device.type == "cuda":
        speed = ASSUMED_MFU * (peak_flops(device) or FLOPS_OF_UNKNOWN_GPU / ASSUMED_MFU)
        speed *= int(os.environ.get("WORLD_SIZE", "1"))
    else:
        speed = FLOPS_OF_A_CPU_CORE * (config.train.threads or torch.get_num_threads())
    return flops * config.plan.tokens(config.train.total_steps) / speed


def _look_at_device(report: PreflightReport, device: torch.device) -> None:
    name = device_name(device)
    report.figures["device"] = name
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        driver = _driver_version()
        report.figures |= {"memory_bytes": total, "memory_free_bytes": free, "driver": driver}
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        said = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, driver {driver}"
        busy = free < 0.9 * total
        report.add(
            "GPU",
            "yes" if bf16 and not busy else "warn",
            said + ("" if bf16 else ", no bfloat16") + (", others use it too" if busy else ""),
        )
    else:
        report.add("device", "yes", f"CPU, {torch.get_num_threads()} threads")
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    known = TORCH_FROM <= release < TORCH_BELOW
    versions = {name: package_version(name) for name in ("triton", "liger-kernel")}
    report.figures |= {"torch": torch.__version__, "cuda": torch.version.cuda, **versions}
    parts = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    parts += [f"{name} {version}" for name, version in versions.items() if version]
    unknown = "" if known else "; this torch is none of those tested, from 2.11 to 2.15"
    report.add("software", "yes" if known else "warn", ", ".join(parts) + unknown)


def _look_at_data(
    report: PreflightReport, config: RunConfig, data: Path, *, made: bool, deep: bool
) -> str | None:
    """Finding and figures of the data; its identity when it can be trained on."""
    if made and not data.exists():
        report.add("data", "yes", f"{config.data.corpus} is prepared in {data} at the start")
        return None
    try:
        stream, _ = open_streams(config, data)
        checked = verify(data, deep=deep)
    except (DataError, ValueError, OSError) as error:
        report.add("data", "no", str(error))
        return None
    tokens = config.plan.tokens(config.train.total_steps)
    epochs = stream.epochs(config.plan.samples(config.train.total_steps))
    report.figures |= {
        "data_id": stream.data_id,
        "data_tokens": checked.tokens,
        "data_bytes_hashed": checked.bytes_hashed,
        "epochs": epochs,
    }
    passes = ", ".join(f"{n:.2f} epochs of {name}" for name, n in epochs.items())
    how = "every byte" if deep else "headers and lengths"
    report.add(
        "data",
        "yes" if max(epochs.values()) <= 4 else "warn",
        f"{checked.tokens:,} tokens in {checked.shards} shards, {how} as the manifest says; "
        f"{tokens:,} tokens are {passes}"
        + ("" if max(epochs.values()) <= 4 else ": past 4 epochs little is learned"),
    )
    return stream.data_id


def _look_at_tasks(report: PreflightReport, config: RunConfig) -> None:
    if not config.eval.tasks:
        return
    try:
        found = read_tasks(config.eval.task_dir or "", config.eval.tasks)
    except ValueError as error:
        report.add("tasks", "no", str(error))
        return
    items = sum(len(task.items) for task in found)
    report.add("tasks", "yes", f"{', '.join(config.eval.tasks)}: {items:,} items")


def _look_at_run_dir(
    report: PreflightReport, config: RunConfig, run_dir: Path, data_id: str | None
) -> int:
    """Finding about the run directory; the step at which the run would go on."""
    try:
        before = check_run_dir(run_dir, config, data_id=data_id)
    except ValueError as error:
        report.add("run", "no", str(error))
        return 0
    if before is None:
        report.add("run", "yes", f"new, in {run_dir}")
        return 0
    checkpoints = Checkpointer(run_dir / "checkpoints", read_only=True)
    steps = [info.step for info in checkpoints.list() if info.problem is None and info.healthy]
    step = max(steps, default=0)
    report.add("run", "yes", f"goes on at step {step:,} in {run_dir}")
    return step


def _look_at_memory(
    report: PreflightReport,
    config: RunConfig,
    device: torch.device,
    world_size: int,
    note: Callable[[str], None],
    *,
    steps: bool,
) -> StepTrial | None:
    """Real `steps` of the micro-batch; where it does not fit, of smaller ones until one does."""
    try:
        sizes = sizes_that_divide(config, world_size)
        wanted = config.train.micro_batch_size
        if wanted == "auto" and device.type == "cpu":
            wanted = max(size for size in sizes if size <= CPU_MICRO_BATCH)
        if wanted != "auto":
            fixed = replace(config, train=replace(config.train, micro_batch_size=wanted))
            fixed.grad_accum_steps(world_size)
    except ValueError as error:
        report.add("batch", "no", str(error))
        return None
    if not steps:
        return None
    note(f"Taking real steps on {device_name(device)}: minutes on a CPU …")
    run = TrialRun(config, device, world_size)
    try:
        parameters = count_params(config.model)
        report.figures |= {"parameters": parameters, "state_bytes": run.state_bytes}
        report.add("model", "yes", f"{parameters:,} parameters")
        if device.type == "cuda":
            _look_at_kernels(report, config, run, device)
        trial = None if wanted == "auto" else run.attempt(wanted)
        if trial is not None and not trial.fits:
            note(describe_trial(trial))
            sizes = [size for size in sizes if size < trial.micro_batch_size]
        if trial is None or not trial.fits:
            best = largest_that_fits(run, sizes, tried=lambda t: note(describe_trial(t)))
        else:
            best = trial
    finally:
        run.close()
    if best is None:
        report.add(
            "memory",
            "no",
            f"not even one sequence of {config.seq_len} tokens fits; lower `train.seq_len` or make "
            "the model smaller",
        )
    elif wanted not in ("auto", best.micro_batch_size):
        report.add(
            "memory",
            "no",
            f"a micro-batch of {wanted} does not fit, the largest power of two that does is "
            f"{best.micro_batch_size}; set `train.micro_batch_size` to it, or to auto",
        )
    else:
        report.add("memory", "yes", describe_trial(best))
    if best is not None:
        report.figures |= {
            "micro_batch_size": best.micro_batch_size,
            "peak_memory_bytes": best.peak_bytes,
        }
    return best


def _look_at_kernels(
    report: PreflightReport, config: RunConfig, run: TrialRun, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, config.seq_len + 1)
    ids = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    checks = check_kernels(run.model, ids.numpy().astype("uint16"), device, fall_back=True)
    wrong = sorted({check.kernel for check in checks if not check.ok})
    worst = max(checks, key=lambda check: check.error)
    said = f"largest error {worst.error:.1e} ({worst.quantity})"
    if wrong:
        said = f"{', '.join(wrong)} compute wrongly here; the plain ones are taken instead"
    report.add("kernels", "warn" if wrong else "yes", said)


def _look_at_disk(report: PreflightReport, config: RunConfig, run_dir: Path, step: int) -> None:
    """Room for all checkpoints that will be there at once, with the one being written."""
    if "state_bytes" not in report.figures:
        return
    kept = config.ckpt.keep_last + 1 + _kept_for_good(config)
    existing = sum(
        file.stat().st_size for file in (run_dir / "checkpoints").glob("step-*/*") if file.is_file()
    )
    need = kept * int(report.figures["state_bytes"])
    place = run_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    report.figures |= {
        "checkpoints_kept": kept,
        "disk_needed_bytes": need,
        "disk_used_bytes": existing,
        "disk_free_bytes": free,
    }
    enough = need <= free + existing
    said = (
        f"{kept} checkpoints of {report.figures['state_bytes'] / 1e9:.2f} GB are "
        f"{need / 1e9:.1f} GB, {free / 1e9:.1f} GB free"
    )
    advice = "; lower `ckpt.keep_last`, raise `ckpt.keep_every`, or take another `--run-dir`"
    report.add("disk", "yes" if enough else "no", said + ("" if enough else advice))


def _kept_for_good(config: RunConfig) -> int:
    """Checkpoints that `ckpt.keep_every` keeps, at most."""
    every, total = config.ckpt.keep_every, config.train.total_steps
    if every is None:
        return 0
    interval = config.ckpt.interval
    if interval.unit == "steps":
        every = math.lcm(every, int(interval.amount))
    return total // every


def _look_at_time(
    report: PreflightReport,
    config: RunConfig,
    trial: StepTrial,
    step: int,
    world_size: int,
    dollars_per_hour: float | None,
    device: torch.device,
) -> None:
    assert trial.micro_step_seconds is not None
    assert trial.update_seconds is not None
    plan, total = config.plan, config.train.total_steps
    tokens = plan.tokens(total) - plan.tokens(step)
    micro_tokens = trial.micro_batch_size * config.seq_len * world_size
    training = tokens / micro_tokens * trial.micro_step_seconds
    training += (total - step) * trial.update_seconds
    # A forward pass alone is a third of a step.
    evaluation = config.eval.tokens / micro_tokens * trial.micro_step_seconds / 3
    interval = config.eval.interval
    evaluations = {
        "steps": (total - step) / interval.amount,
        "tokens": tokens / interval.amount,
        "seconds": training / interval.amount,
    }[interval.unit]
    seconds = training + (evaluations + 2) * evaluation
    flops = flops_per_token(config.model, config.seq_len, causal=False) * tokens
    rate = tokens / training if training else 0.0
    report.figures |= {
        "tokens": tokens,
        "flops_palm": flops,
        "tokens_per_second": rate,
        "seconds": seconds,
    }
    peak = peak_flops(device)
    said = f"{tokens:,} tokens, {flops:.2e} FLOPs at {rate:,.0f} tokens/s"
    if peak is not None and training:
        report.figures["mfu_palm"] = flops / training / peak / world_size
        said += f" (MFU {100 * report.figures['mfu_palm']:.1f} %)"
    said += f": {_hours(seconds)}"
    if dollars_per_hour is not None:
        report.figures["dollars"] = dollars_per_hour * seconds / 3600
        said += f", ${report.figures['dollars']:,.2f} at ${dollars_per_hour:,.2f} an hour"
    report.add("time", "yes", said)


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _driver_version() -> str:
    """Of NVIDIA's kernel module, or "unknown"."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else "unknown"
