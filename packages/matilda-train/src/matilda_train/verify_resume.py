"""Proof of exact resumption: kill a run again and again, and compare it with an undisturbed twin.

Two forms. Many short runs, each killed several times at drawn phases and moments: hundreds of kills
in minutes on a CPU, where lives are forked. One long run whose kills are spread over its steps: for
a GPU, where every life starts afresh, as a user's command does, and the time is accounted for.

Where arithmetic repeats (a CPU, or `train.deterministic`), everything must have the same bits.
Elsewhere the state at every resume point must, and the batches; the losses must stay within what
two undisturbed runs differ by.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matilda_train.config import RunConfig
from matilda_train.config_load import load_config
from matilda_train.console import Display, SilentDisplay
from matilda_train.kernel_noise import measure_noise
from matilda_train.lives import Fault, Life, Nursery
from matilda_train.metrics_log import EventLog, read_rows
from matilda_train.resume_report import ResumeReport
from matilda_train.run_comparison import compare, state_hashes, untimed_rows
from matilda_train.run_dir import RunDir
from matilda_train.stop_signals import EXIT_PREEMPTED
from matilda_train.time_account import goodput

__all__ = ["verify_resume"]

CODE_OF = {"SIGKILL": -9, "SIGTERM": EXIT_PREEMPTED}
SOAK_PHASES = (
    *("starting", "restoring", "warming up", "evaluating", "saving", "sampling"),
    *("training",) * 3,
)
SPREAD_PHASES = (
    *("training", "saving", "training", "evaluating", "restoring"),
    *("training", "warming up", "saving"),
)
# Real preparations and imports take seconds: a few of them are killed too.
RARE_EVERY = 25


def verify_resume(
    config_path: Path,
    *,
    work_dir: Path,
    data_dir: Path | None,
    kills: int = 0,
    spread: tuple[int, int] | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    new_machines: bool = False,
    pause_after_seconds: float = math.inf,
    display: Display | None = None,
    nursery: Nursery | None = None,
) -> ResumeReport:
    """Run the twin, then victims until `kills` lives have been ended and the last run is done.

    With `spread`, so many SIGKILLs and SIGTERMs instead, over the steps of one run. `work_dir` must
    be new or empty, or hold the same proof, interrupted: then it goes on. Compared are weights,
    optimizer, RNG, stream and batch hashes of the newest checkpoint, every metrics row except clock
    and memory figures, and the state in memory before each save and after each restore. With
    `new_machines` every life but the first of a run finds its compilers' caches empty, as on
    another machine that has the run directory alone. Lives come from `nursery`, or from one of its
    own; none begins later than `pause_after_seconds`, and the report is not `complete` then.

    Raises `ValueError` for bad input and `RuntimeError` when a life ends in a way of its own.
    """
    if not all(0 <= number <= 10**6 for number in (kills, *(spread or ()))):
        raise ValueError("`--kills`, `--sigkills` and `--sigterms` must be from 0 to 10^6.")
    if math.isnan(pause_after_seconds):
        raise ValueError("`--pause-after` is nan, but must be a number of seconds.")
    config = load_config(config_path, overrides)
    if config.train.device not in ("auto", "cpu"):
        from matilda_train.hardware import choose_device

        choose_device(config.train.device)  # refused before `work_dir` is this proof's
    proof = Proof(
        config,
        work_dir,
        {
            "config": str(config_path),
            "set": list(overrides),
            "data_dir": str(data_dir) if data_dir else None,
        },
        {
            "kills": kills,
            "spread": list(spread) if spread else None,
            "seed": seed,
            **({"new_machines": True} if new_machines else {}),
        },
        display or SilentDisplay(),
        nursery,
        time.monotonic() + pause_after_seconds,
    )
    try:
        if spread:
            proof.spread(*spread, seed)
        else:
            proof.soak(kills, seed)
    except _PauseError:
        proof.report.complete = False
    finally:
        proof.close()
    return proof.report


class _PauseError(Exception):
    """It is too late to begin another life."""


class Proof:
    """A proof under way in its directory.

    plan.json            what is proved; another plan is refused
    twin/, second/       undisturbed runs
    victim-NNN/          run directories of the victims
    lives/               what each life wrote down, in order
    machine/             compilers' caches of the machine that lives run on, with `new_machines`
    record.jsonl         how each life ended, and what each victim differed in
    """

    def __init__(
        self,
        config: RunConfig,
        work_dir: Path,
        request: Mapping[str, Any],
        plan: Mapping[str, Any],
        display: Display,
        nursery: Nursery | None,
        pause_at: float,
    ) -> None:
        self._config = config
        self._work_dir = work_dir
        self._request = request
        self._overrides = request["set"]
        self._machine = work_dir / "machine" if plan.get("new_machines") else None
        self._display = display
        self._pause_at = pause_at
        _claim(work_dir, {**request, **plan})
        (work_dir / "lives").mkdir(exist_ok=True)
        self._record = work_dir / "record.jsonl"
        logs = sorted((work_dir / "lives").iterdir())
        self._lives = len(logs)
        self._newest_log = logs[-1] if logs else None
        """Of the last life before this command, until one has begun."""
        on_cpu = config.train.device == "cpu" or not _sees_gpu()
        self.report = ResumeReport(bitwise=on_cpu or config.train.deterministic)
        for row in read_rows(self._record):
            self._count(row)
        self._afresh = not on_cpu
        self._own = Nursery(work_dir / "output.log", afresh=self._afresh)
        self._nursery = nursery or self._own

    def close(self) -> None:
        """End the process that lives are forked from."""
        self._own.close()
        self._leave_machine()

    def soak(self, kills: int, seed: int) -> None:
        """Kill lives of one run after the other."""
        twin = self._undisturbed("twin")
        expected = state_hashes(twin), untimed_rows(twin)
        self._display.begin("killing and resuming", total=kills, done=self.report.n_kills)
        while self.report.n_kills < kills:
            victim = f"victim-{self.report.runs:03}"
            data = self._own_data(victim)
            code = -1
            while code != 0:
                fault = None
                if self.report.n_kills < kills:
                    draw = random.Random(f"{seed}/{self._lives}")
                    fault = _draw(draw, preparing=data is not None)
                code = self._live(victim, fault, data).code
                self._display.advance(self.report.n_kills, f"{self.report.runs} runs compared")
            self._compare(victim, *expected)
            if data is not None:
                shutil.rmtree(data)

    def spread(self, sigkills: int, sigterms: int, seed: int) -> None:
        """Kill lives of one run, about equally far apart, and account for its time."""
        twin = self._undisturbed("twin")
        second = None if self.report.bitwise else self._undisturbed("second")
        faults = _spread(
            sigkills,
            sigterms,
            self._config.train.total_steps,
            seed,
            longest_delay_ms=1000 if self._afresh else 20,
        )
        self._display.begin("killing and resuming", total=len(faults), done=self.report.n_kills)
        victim, code = self._work_dir / "victim-000", -1
        compared = self.report.runs > 0  # by an earlier command
        for fault in [*faults[self.report.n_kills :], None]:
            if compared or code == 0:
                break
            code = self._live(victim.name, fault).code
            self._display.advance(self.report.n_kills, f"at most {len(faults)} kills")
        if second is not None:
            self.report.noise = measure_noise(twin, second, victim)
        if not compared and self.report.noise is not None:
            self._append(compared=victim.name, differences=self.report.noise.differences)
        elif not compared:
            self._compare(victim.name, state_hashes(twin), untimed_rows(twin))
        self.report.goodput = goodput(victim).without_idle(self.report.idle_seconds)
        self.report.resumes_compiled = _resumes_compiled(read_rows(victim / "events.jsonl"))

    def _undisturbed(self, name: str) -> Path:
        run_dir = self._work_dir / name
        if EventLog(run_dir / "events.jsonl").last("finish") is None:
            self._display.note(f"training undisturbed: {name}")
            self._live(name, None)
        description = self.report.environment = RunDir.read(run_dir)
        if self._config.train.micro_batch_size == "auto":
            # It decides about rounding, and memory about it: what fitted the twin is for all.
            fits = f"train.micro_batch_size={description['config']['train']['micro_batch_size']}"
            self._request = {**self._request, "set": [*self._overrides, fits]}
        return run_dir

    def _own_data(self, victim: str) -> Path | None:
        """A data folder for every n-th victim to prepare, where the config says from what."""
        number = int(victim.removeprefix("victim-"))
        can_prepare = self._config.data.corpus is not None and self._request["data_dir"] is None
        return (
            self._work_dir / f"{victim}-data" if can_prepare and number % RARE_EVERY == 0 else None
        )

    def _live(self, run: str, fault: Fault | None, data: Path | None = None) -> Life:
        if time.monotonic() > self._pause_at:
            raise _PauseError
        self._note_interruption(run)
        request = {**self._request, "run_dir": str(self._work_dir / run)}
        if data is not None:
            # In the config too: a folder that is only named is never filled with the corpus.
            own = f"data.dir={json.dumps(str(data))}"
            request |= {"data_dir": str(data), "set": [*request["set"], own]}
        if self._machine is not None:
            if any(self._logs_of(run)):
                self._leave_machine()
            request["caches"] = str(self._machine.absolute())
        log = self._work_dir / "lives" / f"{self._lives:05}-{run}.jsonl"
        log.touch()
        self._lives += 1
        life = self._nursery.run(request, log, fault)
        if life.code == 2:
            raise ValueError(self._nursery.last_words().strip().splitlines()[-1])
        if life.code not in (0, CODE_OF[fault.signal] if fault else 0):
            raise RuntimeError(
                f"A life of {run} ended with exit code {life.code}; it said: "
                f"{self._nursery.last_words()}"
            )
        ended = {
            "code": life.code,
            "signal": fault.signal if fault and life.fired else None,
            "phase": life.phase,
            "began": life.began,
            "ended": life.ended,
            "records": life.records,
            "resumed": life.resumed,
            "seconds_to_first_step": life.seconds_to_first_step,
        }
        self._append(run=run, life=ended)
        return life

    def _leave_machine(self) -> None:
        if self._machine is not None:
            shutil.rmtree(self._machine, ignore_errors=True)  # compilers that outlive a kill write

    def _note_interruption(self, run: str) -> None:
        """Write down, once a command, that `run` lay still since the command before."""
        last, self._newest_log = self._newest_log, None
        if last is None or last.stem.partition("-")[2] != run:
            return
        traces = [last, self._record, *(self._work_dir / run).glob("*.jsonl")]
        newest = max(trace.stat().st_mtime for trace in traces if trace.exists())
        self._append(interrupted=run, idle_seconds=max(0.0, time.time() - newest))

    def _compare(
        self, victim: str, state: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        run_dir = self._work_dir / victim
        found = compare(victim, state_hashes(run_dir), untimed_rows(run_dir), state, rows)
        self._append(compared=victim, differences=found)

    def _append(self, **row: Any) -> None:
        with self._record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._count(row)

    def _count(self, row: Mapping[str, Any]) -> None:
        """Take a row of the record into the report."""
        if "compared" in row:
            self.report.runs += 1
            self.report.differences += row["differences"]
            checked, differences = _resume_points(self._logs_of(row["compared"]), row["compared"])
            self.report.resume_points += checked
            self.report.differences += differences
        elif "interrupted" in row:
            self.report.interruptions[row["interrupted"]] += 1
            self.report.idle_seconds += row["idle_seconds"] * (row["interrupted"] == "victim-000")
        else:
            life = row["life"]
            if life["signal"] is not None:
                self.report.kills[life["signal"], life["phase"]] += 1
            if (seconds := life.get("seconds_to_first_step")) is not None:
                starts = self.report.resumes if life["resumed"] else self.report.first_starts
                starts.append(seconds)

    def _logs_of(self, run: str) -> Iterator[dict[str, Any]]:
        for log in sorted((self._work_dir / "lives").glob(f"*-{run}.jsonl")):
            yield from read_rows(log)


def _claim(work_dir: Path, plan: Mapping[str, Any]) -> None:
    """Make `work_dir` the directory of this plan, unless it is another's."""
    file = work_dir / "plan.json"
    text = json.dumps(plan, indent=2) + "\n"
    if not file.is_file() and work_dir.exists() and any(work_dir.iterdir()):
        raise ValueError(f"{str(work_dir)!r} is not empty; give `--run-dir` a new directory.")
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{str(work_dir)!r} holds a proof of other options (`plan.json`); repeat those to go "
            "on with it, or give `--run-dir` a new directory."
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _draw(draw: random.Random, *, preparing: bool) -> Fault:
    """A fault for a life of a short run."""
    kind = draw.choice(("SIGKILL", "SIGTERM"))
    if preparing and draw.random() < 0.5:
        return Fault(signal=kind, phase="preparing data", delay_ms=draw.uniform(0, 1500))
    if draw.random() < 1 / RARE_EVERY:
        return Fault(signal=kind, phase="importing", delay_ms=draw.uniform(0, 1000))
    return Fault(
        signal=kind,
        phase=draw.choice(SOAK_PHASES),
        occurrence=draw.choice((1, 1, 1, 2, 3)),
        delay_ms=draw.choice((0.0, draw.uniform(0, 5), draw.uniform(0, 50))),
    )


def _spread(
    sigkills: int, sigterms: int, total_steps: int, seed: int, *, longest_delay_ms: float
) -> list[Fault]:
    """The faults of one long run, in order."""
    draw = random.Random(seed)
    kinds = ["SIGKILL"] * sigkills + ["SIGTERM"] * sigterms
    draw.shuffle(kinds)
    faults = []
    for number, kind in enumerate(kinds):
        phase = SPREAD_PHASES[number % len(SPREAD_PHASES)]
        # These come once a life, at its beginning: such a kill follows the one before it.
        at_once = phase in ("restoring", "warming up")
        place = (number + draw.uniform(0.2, 0.8)) / len(kinds)
        faults.append(
            Fault(
                signal=kind,
                phase=phase,
                at_step=0 if at_once else int(place * total_steps),
                delay_ms=draw.uniform(0, longest_delay_ms),
            )
        )
    return faults


def _resumes_compiled(events: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Of each resume that came through its first step, whether anything was traced or compiled."""
    found, resumed = [], False
    for event in events:
        if event["event"] == "resume":
            resumed = True
        elif event["event"] == "compiled" and resumed:
            found.append(any(event["graphs"][name] for name in ("traced", "compiled", "kernels")))
    return found


def _resume_points(records: Iterator[dict[str, Any]], run: str) -> tuple[int, list[str]]:
    """How many restored states were compared with the saved one, and those that differ."""
    saved: dict[int, str] = {}
    checked, differences = 0, []
    for record in records:
        if "saved" in record:
            saved[record["saved"]] = record["digest"]
        elif "restored" in record and record["restored"] in saved:
            checked += 1
            if saved[record["restored"]] != record["digest"]:
                differences.append(
                    f"{run}: the state restored at step {record['restored']} is not the saved one"
                )
    return checked, differences
