"""Every crash point × every durable state of the protocol, explored in the model file system.

A scenario drives a real `Checkpointer` on `MemFs`. After each of its file operations every state
that a power cut could leave is built, recovered by a new `Checkpointer`, and judged:

- the newest acknowledged checkpoint, or a newer one, is restored;
- what is restored equals, value for value, what was saved under that name;
- no directory under a checkpoint's name is torn;
- at least two checkpoints are intact once two were acknowledged, and damaged evidence survives;
- the recovered directory accepts and restores a new save.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from matilda_ckpt.background import Background
from matilda_ckpt.catalog import CheckpointInfo
from matilda_ckpt.checkpointer import Checkpointer
from matilda_ckpt.errors import CheckpointError, SaveError
from matilda_ckpt.retention import MIN_KEPT, Keep
from matilda_ckpt.store import Store
from matilda_ckpt.torture.memfs import File, MemFs

ROOT = "/runs/a/checkpoints"


def payload(step: int) -> dict[str, object]:
    """A state that is different at every step, with two tensor files."""
    return {
        "model": {"w": np.full(3, step, dtype=np.int64), "b": np.full(2, step, dtype=np.uint32)},
        "loop": {"step": step, "text": f"step {step}"},
    }


def partly_still(step: int) -> dict[str, object]:
    """Some tensors of the same name change, others never do."""
    model = {"w": np.full(3, step, dtype=np.int64), "frozen": np.arange(5, dtype=np.int64)}
    return {"model": model, "loop": {"step": step}}


def with_tensor(step: int) -> dict[str, object]:
    """A state whose tensor is large enough for its copy to be deferred."""
    import torch

    return {"model": {"w": torch.full((600,), step)}, "loop": {"step": step}}


class HeldBackground(Background):
    """Does not begin to copy before `gate` is open: training is faster than the saving thread."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def alive(self) -> None:
        self.gate.wait()
        super().alive()


@dataclass
class Verdict:
    """Result of one scenario."""

    scenario: str
    crash_points: int = 0
    states: int = 0
    violations: list[str] = field(default_factory=list)


class Explorer:
    """Judges every crash state of one scenario run; the first violations are kept."""

    def __init__(self, scenario: str, fs: MemFs, *, stop_early: bool = False) -> None:
        self.verdict = Verdict(scenario)
        self.fs = fs
        self.acknowledged: list[CheckpointInfo] = []
        self.evidence = 0
        """Checkpoint directories, damaged or not, that must still be somewhere."""
        self.tied = False
        """Two writers may give the same sequence; either is then the newest."""
        self.payload = payload
        self._stop_early = stop_early
        self._seen: set[tuple[object, int]] = set()
        fs.on_operation = self._crash_here

    def saved(self, info: CheckpointInfo) -> None:
        self.acknowledged.append(info)

    def _crash_here(self, operation: str, path: str) -> None:
        self.verdict.crash_points += 1
        for state in self.fs.crash_states():
            key = (_frozen(state), len(self.acknowledged))
            if key in self._seen:
                continue
            self._seen.add(key)
            self.verdict.states += 1
            problem = self._judge(state)
            if problem:
                self.verdict.violations.append(f"after {operation} `{path}`: {problem}")
                if self._stop_early:
                    raise ViolationFoundError

    def _judge(self, state: MemFs) -> str | None:
        reader = Checkpointer(ROOT, fs=state, threads=1, keep=Keep(last=2), share_bytes=1)
        if _directories(state) < self.evidence:
            return "a damaged checkpoint vanished"
        found = reader.list()
        torn = [info.name for info in found if info.problem is not None]
        if torn and not self.evidence:
            return f"torn directory {torn[0]} is visible ({found[0].problem})"
        intact = [info for info in found if info.healthy]
        if len(intact) < min(MIN_KEPT, len({info.name for info in self.acknowledged})):
            return f"{len(intact)} intact checkpoints after {len(self.acknowledged)} saves"
        try:
            restored = reader.restore({})
        except CheckpointError as error:
            return f"nothing could be restored: {error}" if self.acknowledged else None
        if restored is None:
            return "an acknowledged checkpoint is lost" if self.acknowledged else None
        expected = self.payload(restored.step)
        if not _equal(restored.state, expected):
            return f"a torn state of step {restored.step} was loaded"
        if self.acknowledged and not self.tied:
            newest = self.acknowledged[-1]
            if restored.manifest.sequence < newest.sequence:
                return f"acknowledged {newest.name} is lost; {restored.path.name} was restored"
        reader.save(10**6, self.payload(10**6))
        again = reader.restore({})
        if again is None or again.step != 10**6:
            return "the recovered directory does not take a new save"
        return None


class ViolationFoundError(BaseException):
    """Ends a scenario early; not an Exception, so that no handler swallows it."""


Scenario = Callable[[Explorer, "Maker"], None]
Maker = Callable[[MemFs, Keep], Checkpointer]


def plain(fs: MemFs, keep: Keep) -> Checkpointer:
    """The real thing."""
    return Checkpointer(ROOT, fs=fs, keep=keep, threads=1, share_bytes=1)


def with_store(kind: type[Store]) -> Maker:
    """A checkpointer whose store is a (broken) subclass."""

    def make(fs: MemFs, keep: Keep) -> Checkpointer:
        made = Checkpointer(ROOT, fs=fs, keep=keep, threads=1)
        made._store = kind(fs, ROOT, run_id="model", threads=1)
        return made

    return make


def saves(explorer: Explorer, make: Maker) -> None:
    checkpoints = make(explorer.fs, Keep(last=10))
    for step in (1, 2, 3):
        explorer.saved(checkpoints.save(step, payload(step)).result())


def overwrite(explorer: Explorer, make: Maker) -> None:
    checkpoints = make(explorer.fs, Keep(last=10))
    for _ in range(4):
        explorer.saved(checkpoints.save(7, payload(7)).result())


def retention(explorer: Explorer, make: Maker) -> None:
    checkpoints = make(explorer.fs, Keep(last=2))
    for step in range(1, 6):
        handle = checkpoints.save(step, payload(step))
        explorer.saved(handle.result())


def background(explorer: Explorer, make: Maker) -> None:
    checkpoints = make(explorer.fs, Keep(last=2))
    for step in range(1, 5):
        handle = checkpoints.save(step, payload(step), wait=False)
        explorer.saved(handle.result())


def deferred(explorer: Explorer, make: Maker) -> None:
    """The saving thread copies; training changes the very tensors as soon as it may."""
    explorer.payload = with_tensor
    checkpoints = make(explorer.fs, Keep(last=2))
    state = with_tensor(0)
    for step in range(1, 5):
        _advance(state, step)
        handle = checkpoints.save(step, state, wait=False, defer_copy=True)
        checkpoints.wait_copied()
        _advance(state, -step)
        explorer.saved(handle.result())


def deferred_too_early(explorer: Explorer, make: Maker) -> None:
    """At one step training does not wait for the copy: that save must fail."""
    explorer.payload = with_tensor
    checkpoints = make(explorer.fs, Keep(last=2))
    held = checkpoints._background = HeldBackground()
    state = with_tensor(0)
    for step in range(1, 7):
        _advance(state, step)
        held.gate.clear()
        handle = checkpoints.save(step, state, wait=False, defer_copy=True)
        if step == 3:
            _advance(state, -step)
        held.gate.set()
        if step != 3:
            checkpoints.wait_copied()
        try:
            explorer.saved(handle.result())
        except SaveError:
            assert step == 3
        else:
            assert step != 3, "a state that training changed too early became a checkpoint"


def _advance(state: dict[str, object], step: int) -> None:
    """What training does: change the tensor in place, replace the rest."""
    model = state["model"]
    assert isinstance(model, dict)
    model["w"].fill_(step)
    state["loop"] = {"step": step}


def restarts(explorer: Explorer, make: Maker) -> None:
    for step in range(1, 5):
        checkpoints = make(explorer.fs, Keep(last=2))
        checkpoints.restore({})
        explorer.saved(checkpoints.save(step, payload(step)).result())
        checkpoints.close()


def quarantine(explorer: Explorer, make: Maker) -> None:
    checkpoints = make(explorer.fs, Keep(last=10))
    for step in (1, 2, 3, 4):
        explorer.saved(checkpoints.save(step, payload(step)).result())
    node = explorer.fs._find(f"{ROOT}/step-00000004/loop.json")
    assert isinstance(node, File)
    node.data[3] ^= 1
    node.durable = bytes(node.data)
    explorer.acknowledged.pop()
    explorer.evidence = 4
    restored = checkpoints.restore({})
    assert restored is not None
    explorer.saved(checkpoints.save(4, payload(4)).result())


def unchanged(explorer: Explorer, make: Maker) -> None:
    """Files with the same content are shared between checkpoints, from the fifth save on."""
    explorer.payload = partly_still
    explorer.fs.on_operation = lambda _operation, _path: None
    checkpoints = make(explorer.fs, Keep(last=2))
    for step in range(1, 7):
        if step == 5:
            explorer.fs.on_operation = explorer._crash_here
        explorer.saved(checkpoints.save(step, partly_still(step)).result())
    origins = [e.origin for e in checkpoints._store.open("step-00000006")[0].files.values()]
    assert any(origins), "nothing was shared"


def unchanged_cloned(explorer: Explorer, make: Maker) -> None:
    """The same on a file system that can clone files."""
    explorer.fs.clones = True
    unchanged(explorer, make)


def disk_errors(explorer: Explorer, make: Maker) -> None:
    """Operation n of a save fails, n = 1, 2, 3… until a save passes without meeting it."""
    fs = explorer.fs
    step = 1
    for code in (errno.ENOSPC, errno.EIO):
        n = 0
        while True:
            n += 1
            step += 1
            left = [n]

            def fail(operation: str, path: str, left: list[int] = left, code: int = code) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise OSError(code, "injected", path)

            checkpoints = make(fs, Keep(last=2))
            fs.fault = fail
            try:
                explorer.saved(checkpoints.save(step, payload(step)).result())
            except CheckpointError:
                pass
            finally:
                fs.fault = lambda _operation, _path: None
                checkpoints.close()
            if left[0] > 0:
                break


def take_over(explorer: Explorer, make: Maker) -> None:
    """A second writer steals the lock at every operation of the first one's save."""
    explorer.tied = True
    at = 0
    while True:
        at += 1
        fs = MemFs()
        explorer.fs = fs
        explorer.acknowledged = []
        explorer._seen.clear()
        first = make(fs, Keep(last=10))
        for step in (1, 2):
            explorer.saved(first.save(step, payload(step)).result())
        left = [at]

        def steal(operation: str, path: str, left: list[int] = left, fs: MemFs = fs) -> None:
            left[0] -= 1
            if left[0] == 0:
                fs._locks.clear()
                second = make(fs, Keep(last=10))
                explorer.saved(second.save(30, payload(30)).result())
            explorer._crash_here(operation, path)

        fs.on_operation = steal
        with contextlib.suppress(CheckpointError):
            explorer.saved(first.save(3, payload(3)).result())
        if left[0] > 0:
            return


SCENARIOS: dict[str, Scenario] = {
    "save": saves,
    "same step again": overwrite,
    "retention": retention,
    "background": background,
    "background, deferred copy": deferred,
    "deferred copy, changed too early": deferred_too_early,
    "restarts": restarts,
    "quarantine": quarantine,
    "unchanged, linked": unchanged,
    "unchanged, cloned": unchanged_cloned,
    "disk errors": disk_errors,
    "two writers": take_over,
}


def explore(name: str, make: Maker = plain, fs: MemFs | None = None) -> Verdict:
    """Run one scenario; with a seeded bug (`make` or `fs` differ) stop at the first violation."""
    seeded = fs is not None or make is not plain
    chosen = fs or MemFs()
    explorer = Explorer(name, chosen, stop_early=seeded)
    try:
        SCENARIOS[name](explorer, make)
    except ViolationFoundError:
        pass
    except CheckpointError:
        if not explorer.verdict.violations:
            raise
    return explorer.verdict


def _frozen(fs: MemFs) -> object:
    def freeze(node: object) -> object:
        if isinstance(node, File):
            return bytes(node.data)
        return tuple((n, freeze(c)) for n, c in sorted(node.names.items()))  # type: ignore[attr-defined]

    return freeze(fs.top)


def _directories(fs: MemFs) -> int:
    """Checkpoint directories in place and in quarantine."""
    root = fs._find(ROOT)
    aside = fs._find(f"{ROOT}/quarantine")
    count = 0
    for folder in (root, aside):
        names = getattr(folder, "names", {})
        count += sum(name.startswith("step-") for name in names)
    return count


def _equal(found: object, expected: object) -> bool:
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_equal(found[key], expected[key]) for key in expected)
        )
    if isinstance(expected, np.ndarray):
        return (
            isinstance(found, np.ndarray)
            and found.dtype == expected.dtype
            and bool(np.array_equal(found, expected))
        )
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and bool(torch.equal(found, expected))
    return found == expected
