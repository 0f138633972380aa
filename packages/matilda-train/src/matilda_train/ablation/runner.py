"""Trains what is missing of a study, several runs at once where there is room.

Runs are trained by worker processes (`matilda_train.ablation.worker`), each with one GPU, one run
after another. What a run has reached is its own run directory's matter, so a study that was killed
anywhere goes on when it is started again, and what is finished is not touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import torch

from matilda_train.ablation.plan import Job, Study, outcome_of
from matilda_train.config import RunConfig
from matilda_train.console import SilentDisplay
from matilda_train.data_source import choose_data_dir, makes_corpus, open_streams
from matilda_train.hardware import choose_device
from matilda_train.metrics_log import read_rows
from matilda_train.preparation import prepare_corpus

__all__ = ["Ending", "Progress", "StudyDisplay", "places", "run_study"]

Ending = Literal["complete", "stopped", "failed"]
ATTEMPTS = 2
GRACE_SECONDS = 120.0


@dataclass
class Progress:
    """What the runs of a study are doing."""

    rows: Sequence[str]
    seeds: int
    done: dict[tuple[str, int], str] = field(default_factory=dict)
    """Final loss, or how else it ended, by row and seed."""
    running: dict[tuple[str, int], float] = field(default_factory=dict)
    """Share of the steps done."""
    first: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)
    """Monotonic time at which a run of this call was first heard of, and its share then."""
    seconds: list[float] = field(default_factory=list)
    """Durations of the runs that ended in this call."""
    workers: int = 1

    def eta_seconds(self) -> float | None:
        """Seconds until the last run ends, were all as long as those of this call: those that have
        ended or, before the first has, those that train."""
        durations = self.seconds or list(self._expected())
        if not durations:
            return None
        left = len(self.rows) * self.seeds - len(self.done) - sum(self.running.values())
        return left * statistics.median(durations) / self.workers

    def _expected(self) -> Iterator[float]:
        now = time.monotonic()
        for key, (began, share) in self.first.items():
            if self.running.get(key, 0.0) - share > 0.02:  # enough steps for a pace
                yield (now - began) / (self.running[key] - share)


class StudyDisplay(Protocol):
    """Where a study reports to."""

    def show(self, progress: Progress) -> None: ...
    def note(self, text: str) -> None: ...


def places(gpus: int | None, jobs_per_gpu: int, environment: str | None = None) -> list[str | None]:
    """`CUDA_VISIBLE_DEVICES` of each worker; None leaves it alone (a CPU, or the one GPU there is).

    `environment` is the variable as it is set: its devices are taken in turn.
    """
    if not all(1 <= number <= 1024 for number in (jobs_per_gpu, 1 if gpus is None else gpus)):
        raise ValueError("`--gpus` and `--jobs-per-gpu` must be from 1 to 1024.")
    if gpus is None:
        return [None] * jobs_per_gpu
    visible = environment.split(",") if environment else [str(number) for number in range(gpus)]
    if len(visible) < gpus:
        raise ValueError(
            f"`--gpus` is {gpus}, but CUDA_VISIBLE_DEVICES names {len(visible)}: {environment}."
        )
    return [device for _ in range(jobs_per_gpu) for device in visible[:gpus]]


def run_study(
    study: Study,
    *,
    data_dir: Path | None,
    where: Sequence[str | None] = (None,),
    in_process: bool = False,
    take_turns: bool = False,
    keep_checkpoints: bool = True,
    stop: Callable[[], bool] = lambda: False,
    stop_after: float | None = None,
    display: StudyDisplay,
) -> Ending:
    """Train every run that is not finished: `complete` if all of them are now, diverged ones too.

    After `stop_after` seconds, and once `stop()` is true, runs are saved and stopped; none begins
    that would not end by then, going by those before it: `stopped`. Nor does any without a place in
    `where`. A run that fails is named and left out, `failed` in the end: the rest goes on, and the
    next call tries it again. With `take_turns`, of the runs that share a place one trains at a time
    while the others start. Raises `ValueError` while another process trains the study, where
    runs of other machines read other data, or where `study.out` is the directory of a run.
    """
    if (study.out / "run.json").exists():
        raise ValueError(
            f"{str(study.out)!r} holds a run (`run.json`), no study; "
            "give `--out` a folder of its own."
        )
    jobs = study.jobs()
    progress = Progress([row.name for row in study.rows], study.seeds)
    waiting: deque[Job] = deque()
    for job in jobs:
        outcome, known = outcome_of(job.run_dir), study.earlier.runs.get(job.key)
        if outcome is not None:
            progress.done[job.key] = _describe(job, outcome)
        elif known is None:
            waiting.append(job)
        else:
            loss = known.loss_nats
            progress.done[job.key] = known.outcome if loss is None else f"{loss:.4f}"
    call = _Call(
        study=study,
        waiting=waiting,
        progress=progress,
        display=display,
        data_dir=data_dir,
        keep_checkpoints=keep_checkpoints,
        stop=stop,
        deadline=None if stop_after is None else time.monotonic() + stop_after,
        shared=not take_turns
        and (len(where) > len(set(where)) or (len(where) > 1 and None in where)),
        take_turns=take_turns,
    )
    display.show(progress)
    if waiting and (in_process or where):
        study.out.mkdir(parents=True, exist_ok=True)
        if keep_checkpoints:
            _look_at_disk(study, waiting, display)
        with _held(study.out):
            if not call.stopping():
                _make_corpora(study, waiting, data_dir, call.stopping, display)
            if not call.stopping():
                _look_at_ground(study, waiting[0].config, data_dir)
            if in_process:
                call.run_here()
            else:
                progress.workers = min(len(where), len(waiting))
                call.run_workers(where[: len(waiting)])
    display.show(progress)
    if "failed" in progress.done.values():
        return "failed"
    return "complete" if len(progress.done) == len(jobs) else "stopped"


def _make_corpora(
    study: Study,
    waiting: Sequence[Job],
    data_dir: Path | None,
    stop: Callable[[], bool],
    display: StudyDisplay,
) -> None:
    """Prepare each `data.corpus` that is missing once: of workers that all would, one could."""
    configs = {
        choose_data_dir(data_dir, job.config, study.out): job.config
        for job in waiting
        if makes_corpus(data_dir, job.config)
    }
    for folder, config in configs.items():
        if not folder.exists():
            display.note(f"preparing {config.data.corpus} in {folder}")
        prepare_corpus(config.data, folder, stop=stop, display=SilentDisplay())


def _look_at_ground(study: Study, config: RunConfig, data_dir: Path | None) -> None:
    """`ValueError` for a device or data that no run could have, before any process is started."""
    choose_device(config.train.device)
    found = open_streams(config, choose_data_dir(data_dir, config, study.out))[0].data_id
    known = study.earlier.provenance.get("data_id")
    if study.earlier.runs and known and found not in known:
        raise ValueError(
            f"The runs of `--earlier` read the data set {', '.join(map(str, known))}, but this is "
            f"{found}; give `--data-dir` the same, or leave them out."
        )


def _look_at_disk(study: Study, waiting: Sequence[Job], display: StudyDisplay) -> None:
    """Say so where the checkpoints to come, 12 bytes a parameter, may not have room."""
    need = sum(12 * job.config.model.n_params * job.config.ckpt.keep_last for job in waiting)
    free = shutil.disk_usage(study.out).free
    if need > free:
        display.note(
            f"The checkpoints of {len(waiting)} runs may take {need / 1e9:,.2f} GB, but "
            f"{free / 1e9:,.2f} GB are free; `--discard-checkpoints` keeps metrics alone."
        )


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Keep a second call out of the study; `ValueError` while another trains in it."""
    with (out / "study.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"Another process is training the study {str(out)!r}; wait for it or stop it, or "
                "choose another `--out`."
            ) from None
        yield


@dataclass(kw_only=True)
class _Call:
    """One call of `run_study`."""

    study: Study
    waiting: deque[Job]
    progress: Progress
    display: StudyDisplay
    data_dir: Path | None
    keep_checkpoints: bool
    stop: Callable[[], bool]
    deadline: float | None
    shared: bool
    take_turns: bool
    attempts: dict[tuple[str, int], int] = field(default_factory=dict)

    def run_here(self) -> None:
        """One after another in this process."""
        from matilda_train.ablation.worker import train_job

        while (job := self.next_job()) is not None:
            self.begin(job)

            def report(row: dict[str, Any], job: Job = job) -> None:
                self.hear(job, row)

            train_job(self.request(job, None), self.stopping, report)

    def threads_each(self, workers: int) -> int | None:
        """Threads of each of the workers that share a CPU, which would else spin on one another's
        cores; None where they do not, or where `OMP_NUM_THREADS` says it."""
        device = choose_device(self.study.rows[0].config.train.device)
        if device.type != "cpu" or not self.shared or "OMP_NUM_THREADS" in os.environ:
            return None
        return max(1, torch.get_num_threads() // workers)

    def run_workers(self, where: Sequence[str | None]) -> None:
        """At once, in a worker for each place."""
        logs = self.study.out / "logs"
        logs.mkdir(exist_ok=True)
        selector = selectors.DefaultSelector()
        workers: list[_Worker] = []
        threads = self.threads_each(len(where))

        def hire(number: int) -> None:
            worker = _Worker(number, where[number], logs / f"worker-{number}.log", threads)
            workers.append(worker)
            selector.register(worker.reports, selectors.EVENT_READ, worker)

        for number in range(len(where)):
            hire(number)
        asked: float | None = None
        try:
            while workers:
                for event, _ in selector.select(timeout=0.1):
                    worker = event.data
                    for row in worker.read():
                        if worker.job is not None and self.hear(worker.job, row):
                            worker.job = None
                    if not worker.ended:
                        continue
                    selector.unregister(worker.reports)
                    workers.remove(worker)
                    worker.process.wait()
                    if worker.job is not None and asked is None:
                        self.lost(worker.job, worker.process.returncode)
                    if self.waiting and not self.stopping():
                        hire(worker.number)
                if asked is None and self.stopping():
                    asked = time.monotonic()
                    for worker in workers:
                        worker.process.send_signal(signal.SIGTERM)
                if asked is not None and time.monotonic() - asked > GRACE_SECONDS:
                    break
                for worker in workers:
                    if worker.job is None and not worker.dismissed and asked is None:
                        job = self.next_job()
                        if job is None:
                            worker.dismiss()
                        else:
                            self.begin(job)
                            turn = self.study.out / f"turn-{worker.device}.lock"
                            worker.train(job, self.request(job, turn if self.take_turns else None))
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.wait()
            selector.close()

    def stopping(self) -> bool:
        return self.stop() or (self.deadline is not None and time.monotonic() > self.deadline)

    def next_job(self) -> Job | None:
        """The next run to train, if there is one and it has the time to end."""
        if not self.waiting or self.stopping():
            return None
        seconds = statistics.median(self.progress.seconds) if self.progress.seconds else 0.0
        if self.deadline is not None and time.monotonic() + seconds > self.deadline:
            return None
        return self.waiting.popleft()

    def request(self, job: Job, turn: Path | None) -> dict[str, Any]:
        return job.request(
            data_dir=self.data_dir, keep_checkpoints=self.keep_checkpoints, turn=turn
        )

    def begin(self, job: Job) -> None:
        self.attempts[job.key] = self.attempts.get(job.key, 0) + 1
        self.progress.running[job.key] = 0.0
        self.note_job(job, "started")
        self.display.show(self.progress)

    def hear(self, job: Job, row: dict[str, Any]) -> bool:
        """Take in a report; whether it says that the run has ended."""
        if "outcome" not in row:
            if "of" in row:
                share = self.progress.running[job.key] = row["step"] / row["of"]
                self.progress.first.setdefault(job.key, (time.monotonic(), share))
                self.display.show(self.progress)
            return False
        self.progress.running.pop(job.key, None)
        outcome, error = row["outcome"], row.get("error", "")
        self.note_job(job, outcome, seconds=row["seconds"], error=error)
        if outcome in ("finished", "diverged"):
            self.progress.seconds.append(row["seconds"])
        if outcome != "preempted":
            self.progress.done[job.key] = _describe(job, outcome)
            tail = f": {error}" if error else f", {row['seconds']:.0f} s"
            said = self.progress.done[job.key]
            self.display.note(f"{job.row}, seed {job.seed}: {said}{tail}")
        self.display.show(self.progress)
        return True

    def lost(self, job: Job, code: int) -> None:
        """The worker of a run has died: once more from the newest checkpoint, then give it up."""
        self.progress.running.pop(job.key, None)
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        again = self.attempts[job.key] < ATTEMPTS
        self.note_job(job, "lost", error=what)
        self.display.note(
            f"{job.row}, seed {job.seed}: its process ended ({what}); "
            + ("it goes on from its newest checkpoint" if again else f"see {self.study.out}/logs")
        )
        if again:
            self.waiting.appendleft(job)
        else:
            self.progress.done[job.key] = "failed"

    def note_job(self, job: Job, outcome: str, **fields: Any) -> None:
        row = {"row": job.row, "seed": job.seed, "outcome": outcome, "shared": self.shared}
        with self.study.ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"time": round(time.time(), 3)} | fields) + "\n")


class _Worker:
    """A worker process and the run it is at."""

    def __init__(self, number: int, device: str | None, log: Path, threads: int | None) -> None:
        self.number = number
        self.device = device
        self.job: Job | None = None
        self.ended = self.dismissed = False
        self._rest = b""
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "matilda_train.ablation.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                start_new_session=True,  # Ctrl-C is a request to the study, which passes it on
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests: IO[bytes] = self.process.stdin
        self.reports: IO[bytes] = self.process.stdout
        os.set_blocking(self.reports.fileno(), False)

    def train(self, job: Job, request: dict[str, Any]) -> None:
        """Give it a run; should it be gone already, its end tells."""
        self.job = job
        try:
            self._requests.write((json.dumps(request) + "\n").encode())
            self._requests.flush()
        except BrokenPipeError:
            pass

    def dismiss(self) -> None:
        """No more runs: it ends."""
        self.dismissed = True
        self._requests.close()

    def read(self) -> list[dict[str, Any]]:
        """The whole lines that have come; `ended` once there will be no more."""
        piece = os.read(self.reports.fileno(), 1 << 16)
        self.ended = not piece
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [json.loads(line) for line in lines]


def _describe(job: Job, outcome: str) -> str:
    """What a table says of a run that has ended: its loss, or how else it ended."""
    if outcome != "finished":
        return outcome
    rows = read_rows(job.run_dir / "metrics.jsonl")
    losses = [row["val_loss_nats"] for row in rows if row.get("val_loss_nats") is not None]
    return f"{losses[-1]:.4f}" if losses else "finished"
