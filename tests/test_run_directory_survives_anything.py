"""What people, disks and clocks do to a run directory, in sequences drawn from a seed.

After each deed: nobody has seen a traceback, no program that only looks has changed a byte, what
was saved is still there, and no run that has saved has begun anew. At the end of each sequence the
run is brought to its end, in the bits of an undisturbed one.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from killable_runs import TrainServer, state_sha256
from matilda_ckpt import Checkpointer, verify
from matilda_train.metrics_log import read_rows
from matilda_train.run_comparison import untimed_rows

ROOT = Path(__file__).resolve().parent.parent
LOOKS = (
    "generate.py --run {run} --tokens 4",
    "report.py {run} --out {run}.html",
    "trace.py --run {run} --step 5 --data-dir {data}",
    "replay.py --run {run} --step 5 --data-dir {data}",
    "train.py --config {config} --run-dir {run} --data-dir {data} --preflight",
)


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def newest_saved(run_dir: Path) -> int:
    found = Checkpointer(run_dir / "checkpoints", read_only=True).list()
    return max((info.step for info in found if verify(info.path).ok), default=-1)


class Fate:
    """One run directory and what is done to it."""

    def __init__(
        self, seed: int, server: TrainServer, config: Path, data: Path, folder: Path
    ) -> None:
        self.draw = random.Random(seed)
        self.server, self.config, self.data = server, config, data
        self.run_dir = folder / "run"
        self.left_behind: list[tuple[Path, dict[str, str]]] = []
        """Copies and originals that nobody goes on with, and what is in them."""
        self.rows_are_whole = True
        self.said = ""

    def train(self, *codes: int, **fault: object) -> int:
        self.server.log.write_text("")
        code = self.server.run(self.config, self.run_dir, self.data, **fault)
        self.said = self.server.log.read_text()
        assert code in codes, self.said
        return code

    def is_killed(self) -> None:
        step, fsync = self.draw.randint(1, 9), self.draw.randint(1, 60)
        fault = self.draw.choice([{"at_step": step}, {"at_fsync": fsync}])
        name = self.draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1"])
        self.train(0, 75, -9, **fault, signal=name)

    def meets_a_clock_that_jumps(self) -> None:
        self.train(0, 75, clock_jumps=True, at_step=3, signal="SIGTERM", set=["log.autopsies=4"])

    def is_asked_for_another_recipe(self) -> None:
        before = tree(self.run_dir)
        field = self.draw.choice(["optim.lr=0.5", "train.total_steps=13", "model.n_layers=1"])
        if (self.run_dir / "run.json").exists():
            self.train(2, set=[field])
            assert tree(self.run_dir) == before

    def is_moved(self) -> None:
        self.run_dir = self.run_dir.rename(self.run_dir.with_name(f"{self.run_dir.name} →"))

    def is_copied(self) -> None:
        target = self.run_dir.with_name(f"copy {len(self.left_behind)}")
        copy = self.draw.choice([shutil.copy2, os.link])
        shutil.copytree(self.run_dir, target, copy_function=copy)
        if self.draw.random() < 0.5:
            self.run_dir, target = target, self.run_dir
        # The writer's lock is a scratch pad that a hard link shares; it holds nothing of the run.
        kept = {k: v for k, v in tree(target).items() if k != "checkpoints/LOCK"}
        self.left_behind.append((target, kept))

    def is_looked_at(self) -> None:
        if newest_saved(self.run_dir) < 0:
            return
        before = tree(self.run_dir)
        names = {"run": "RUN", "config": self.config, "data": self.data}
        name, *words = self.draw.choice(LOOKS).format_map(names).split()
        words = [word.replace("RUN", str(self.run_dir)) for word in words]
        done = self.server.run_program(ROOT / "apps" / name, words, self.run_dir.parent)
        assert done.returncode == 0, done.stderr
        assert tree(self.run_dir) == before

    def loses_checkpoints(self) -> None:
        saved = sorted((self.run_dir / "checkpoints").glob("step-*"))
        events = read_rows(self.run_dir / "events.jsonl")
        acknowledged = [e["step"] for e in events if e["event"] == "save"]
        if len(saved) > 1 and self.draw.random() < 0.7:
            shutil.rmtree(saved[-1])
        elif saved and acknowledged:
            away = (self.run_dir / "checkpoints").rename(self.run_dir.parent / "away")
            before = tree(self.run_dir)
            finished = events[-1]["event"] == "finish"
            self.train(0 if finished else 4)  # metrics alone may be what is kept of a finished run
            assert tree(self.run_dir) == before
            away.rename(self.run_dir / "checkpoints")

    def finds_a_checkpoint_damaged(self) -> None:
        saved = sorted((self.run_dir / "checkpoints").glob("step-*"))
        if len(saved) < 2:
            return
        file = self.draw.choice(sorted(saved[-1].iterdir()))
        content = bytearray(file.read_bytes())
        content[self.draw.randrange(len(content))] ^= 1
        file.unlink()  # a copy may have the same file, and that one is whole
        file.write_bytes(content[:-1] if self.draw.random() < 0.3 else content)

    def finds_logs_with_rubbish(self) -> None:
        rubbish = [b"\0" * 99, b"[" * 9999, b"1" * 9999, b'{"step": tr', b"null\n{}\n", b"\xff\n"]
        for name in ("metrics.jsonl", "events.jsonl"):
            file = self.run_dir / name
            if file.exists() and self.draw.random() < 0.7:
                content = file.read_bytes()
                file.unlink()
                file.write_bytes(content + self.draw.choice(rubbish))
                self.rows_are_whole &= name != "metrics.jsonl"

    def check(self, saved_before: int, may_lose: bool) -> None:
        assert "Traceback" not in self.said
        if not may_lose:
            assert newest_saved(self.run_dir) >= saved_before
        names = [row.get("event") for row in read_rows(self.run_dir / "events.jsonl")]
        if "save" in names:
            assert "start" not in names[names.index("save") :]
        for folder, content in self.left_behind:
            now = tree(folder)
            assert {k: now.get(k) for k in content} == content


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_run_directory_survives_anything(
    seed: int, server: TrainServer, tiny_config: Path, corpus: Path, twin: Path, tmp_path: Path
) -> None:
    fate = Fate(seed, server, tiny_config, corpus, tmp_path)
    harm = [fate.loses_checkpoints, fate.finds_a_checkpoint_damaged]
    deeds: list[Callable[[], None]] = [
        *3 * [fate.is_killed],
        *2 * [fate.is_looked_at],
        fate.meets_a_clock_that_jumps,
        fate.is_asked_for_another_recipe,
        fate.is_moved,
        fate.is_copied,
        fate.finds_logs_with_rubbish,
        *harm,
    ]
    fate.is_killed()
    for deed in fate.draw.choices(deeds, k=15):
        saved = newest_saved(fate.run_dir)
        if fate.run_dir.exists():
            deed()
        fate.check(saved, may_lose=deed in harm)
    fate.train(0)
    fate.check(-1, may_lose=True)
    assert state_sha256(fate.run_dir) == state_sha256(twin)
    if fate.rows_are_whole:
        assert untimed_rows(fate.run_dir) == untimed_rows(twin)
