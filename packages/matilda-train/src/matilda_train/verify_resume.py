"""Proof of exact resumption: kill a run again and again, and compare it with an undisturbed twin.

Each life of the victim is a process forked from one that has imported torch but run nothing, so
that hundreds of kills take minutes. A life is told the phase in which to end and after how many
milliseconds of it; what it was doing then is what a preemption would have met.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matilda_train.config_load import load_config
from matilda_train.console import Display, SilentDisplay
from matilda_train.metrics_log import MACHINE_FIELDS, read_rows
from matilda_train.phases import PHASES

__all__ = ["ResumeReport", "state_hashes", "untimed_rows", "verify_resume"]

KILLABLE_PHASES = tuple(phase for phase in PHASES if phase != "preparing data")
SERVER_PROGRAM = "from matilda_train.verify_resume import serve_lives; serve_lives()"


@dataclass
class ResumeReport:
    """What was done to the victims, and how they differ from the twin: not at all, or failed."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Lives ended by (signal, phase)."""
    runs: int = 0
    """Victim runs brought to their end."""
    differences: list[str] = field(default_factory=list)
    """One sentence for each value that is not bitwise equal to the twin's."""

    @property
    def n_kills(self) -> int:
        """Lives ended in all."""
        return sum(self.kills.values())


def verify_resume(
    config_path: Path,
    *,
    work_dir: Path,
    data_dir: Path | None,
    kills: int,
    overrides: Sequence[str] = (),
    seed: int = 0,
    display: Display | None = None,
) -> ResumeReport:
    """Run the twin once, then victims until `kills` lives have been ended and the last is done.

    `work_dir` must be new or empty; it ends up holding `twin/` and `victim-…/` run directories.
    Half of the lives end by SIGKILL, the others by SIGTERM (which must exit with 75). Compared are
    weights, optimizer, RNG, stream and batch hashes of the newest checkpoint, and every metrics row
    except clock and memory figures. Raises `ValueError` for bad input and `RuntimeError` when a
    life ends in a way of its own.
    """
    load_config(config_path, overrides)
    if work_dir.exists() and any(work_dir.iterdir()):
        raise ValueError(f"{str(work_dir)!r} is not empty; give `--run-dir` a new directory.")
    work_dir.mkdir(parents=True, exist_ok=True)
    display = display or SilentDisplay()
    draw = random.Random(seed)
    report = ResumeReport()
    lives = LifeServer(work_dir / "output.log")
    request = {
        "config": str(config_path),
        "set": list(overrides),
        "data_dir": str(data_dir) if data_dir else None,
    }
    try:
        display.note("training the undisturbed twin")
        twin = work_dir / "twin"
        lives.run(request | {"run_dir": str(twin)}, expect=(0,))
        expected_state, expected_rows = state_hashes(twin), untimed_rows(twin)
        display.begin("killing and resuming", total=kills)
        while report.n_kills < kills:
            victim = work_dir / f"victim-{report.runs:03}"
            code = -1
            while code != 0:
                fault = {}
                if report.n_kills < kills:
                    fault = {
                        "signal": draw.choice(("SIGKILL", "SIGTERM")),
                        "phase": draw.choice(KILLABLE_PHASES),
                        "occurrence": draw.choice((1, 1, 2, 3, 5)),
                        "delay_ms": draw.choice((0.0, draw.uniform(0, 5), draw.uniform(0, 50))),
                    }
                code = lives.run(request | {"run_dir": str(victim)} | fault, expect=(0, -9, 75))
                if code != 0:
                    report.kills[str(fault["signal"]), str(fault["phase"])] += 1
                    display.advance(report.n_kills, f"{report.runs} runs compared")
            report.runs += 1
            report.differences += compare(
                victim.name,
                state_hashes(victim),
                untimed_rows(victim),
                expected_state,
                expected_rows,
            )
    finally:
        lives.close()
    return report


def state_hashes(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every tensor and value in a run's newest checkpoint, by its path in the state."""
    import torch

    from matilda_ckpt import Checkpointer

    hashes: dict[str, str] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in value:
                walk(f"{name}/{key}", value[key])
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(f"{name}/{index}", item)
        elif isinstance(value, torch.Tensor):
            head = f"{value.dtype} {tuple(value.shape)}".encode()
            raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            hashes[name] = hashlib.sha256(head + raw).hexdigest()
        else:
            hashes[name] = hashlib.sha256(repr(value).encode()).hexdigest()

    walk("", Checkpointer(run_dir / "checkpoints", read_only=True).load_state())
    return hashes


def untimed_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Every metrics row of a run without what clocks, allocator and kills decide."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in MACHINE_FIELDS} for row in rows]


def compare(
    name: str,
    state: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    expected_state: Mapping[str, str],
    expected_rows: Sequence[Mapping[str, Any]],
) -> list[str]:
    """One sentence for each difference between a victim and the twin."""
    found = [
        f"{name}: state {key!r} differs from the twin's"
        for key in sorted(state.keys() | expected_state.keys())
        if state.get(key) != expected_state.get(key)
    ]
    if len(rows) != len(expected_rows):
        found.append(f"{name}: {len(rows)} metrics rows, the twin has {len(expected_rows)}")
    found += [
        f"{name}: metrics row of step {row['step']} differs: {dict(row)} is not {dict(expected)}"
        for row, expected in zip(rows, expected_rows, strict=False)
        if row != expected
    ]
    return found


class LifeServer:
    """The process that lives are forked from; one request and one reply a line, in JSON."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, request: Mapping[str, Any], *, expect: Sequence[int]) -> int:
        """One life; returns its exit code, negative for the signal that ended it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**request, "log": str(self._log)}) + "\n")
        self._process.stdin.flush()
        code = int(json.loads(self._process.stdout.readline()))
        if code not in expect:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(
                f"A life ended with exit code {code}, expected {tuple(expect)}; it said: {tail}"
            )
        return code

    def close(self) -> None:
        """End the server; no life is running between two requests."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve_lives() -> None:
    """Main function of the server process."""
    import torch._dynamo  # noqa: F401  (torch's optimizers load it on first use, for seconds)

    import matilda_train.loop  # noqa: F401  (torch is loaded once, for all lives)

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _live(request)
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])), flush=True)


def _live(request: Mapping[str, Any]) -> None:
    """One life of a run, ended at the wanted phase; never returns."""
    code = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = _train(request)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _train(request: Mapping[str, Any]) -> int:
    from matilda_train.loop import train
    from matilda_train.stop_signals import EXIT_PREEMPTED, StopRequest

    stop = StopRequest().install().begin()
    met: Counter[str] = Counter()

    def on_phase(phase: str) -> None:
        met[phase] += 1
        if phase == request.get("phase") and met[phase] == request["occurrence"]:
            number = getattr(signal, request["signal"])
            if request["delay_ms"] == 0:
                os.kill(os.getpid(), number)
                return
            # The timer's thread signals the process, wherever its main thread is by then.
            delay = request["delay_ms"] / 1e3
            timer = threading.Timer(delay, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()

    result = train(
        load_config(request["config"], request["set"]),
        run_dir=request["run_dir"],
        data_dir=request["data_dir"],
        stop=lambda: bool(stop),
        on_phase=on_phase,
    )
    return EXIT_PREEMPTED if result.status == "preempted" else 0
