"""The directory of one run: what it is made of, what it did, and the lock that keeps it single.

run.json                  resolved config, identities, code and environment; written once
                          (`parent`: which checkpoint of which run a decay began with)
metrics.jsonl             a row for each logged step
metrics.discarded.jsonl   rows of steps that were redone after a kill or a rollback
events.jsonl              start, resume, save, skip, spike, rollback, finish, …
checkpoints/              see matilda-ckpt
autopsies/                bundles of bad steps, see matilda_train.autopsy
compile-cache/            what torch.compile made, for the next process
evals/                    scores of checkpoints on tasks, see apps/evaluate.py
hangs/                    stacks of processes that made no progress
samples/                  text sampled from the model
run.lock                  held while a process trains here
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from matilda_train.config import RunConfig
from matilda_train.config_load import (
    config_differences,
    config_from_dict,
    config_identity,
    config_to_dict,
)
from matilda_train.errors import naming

__all__ = ["RunDir", "check_output", "check_run_dir", "write_durably", "write_output"]


class RunDir:
    """Open or create a run directory; nothing is written before `open` has checked everything."""

    def __init__(
        self,
        path: Path,
        lock: int,
        rounding_changes: Mapping[str, str] | None = None,
        other_changes: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._rounding = dict(rounding_changes or {})
        self._others = dict(other_changes or {})
        self._lock: int | None = lock

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: RunConfig,
        *,
        data_id: str,
        provenance: Callable[[], Mapping[str, Any]],
    ) -> RunDir:
        """Start a run in `path`, or go on with the one that is there.

        `provenance` is asked once: a new run keeps it, of another what changed is kept.

        Raises `ValueError` when the directory belongs to another config or
        data set, when another process trains in it, or when it holds something else.
        """
        path = Path(path)
        found = path / "run.json"
        description = check_run_dir(path, config, data_id=data_id)
        if description is not None:
            lock = _take_lock(path)
            _unshare_logs(path)
            _, rounding, free = config_differences(description["config"], config)
            return cls(path, lock, rounding, free | _other_values(description, provenance()))
        path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path)
        description = {
            "format": "matilda-run/1",
            "run_id": secrets.token_hex(8),
            "config": config_to_dict(config),
            "config_sha256": config_identity(config),
            "data_id": data_id,
            **provenance(),
        }
        write_durably(found, json.dumps(description, indent=2, sort_keys=True) + "\n")
        return cls(path, lock)

    @staticmethod
    def read(path: str | Path) -> dict[str, Any]:
        """The contents of `run.json`; `ValueError` when `path` holds no run that can be read."""
        file = Path(path) / "run.json"
        if not file.is_file():
            raise ValueError(
                f"{str(path)!r} is not a run directory: it holds no `run.json`; "
                f"{_run_meant(Path(path))}"
            )
        try:
            description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            _ = description["data_id"], description["run_id"], description["config"].items()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{str(file)!r} is damaged ({error}); restore it from a backup, or start anew in "
                "another `--run-dir`."
            ) from None
        return description

    @staticmethod
    @contextmanager
    def hold(path: str | Path) -> Iterator[None]:
        """Keep others from training in the run meanwhile; `ValueError` when a process does."""
        lock = _take_lock(Path(path))
        try:
            yield
        finally:
            os.close(lock)

    @staticmethod
    def config(path: str | Path) -> RunConfig:
        """The config of the run in `path`; `ValueError` as `read`, or of another version."""
        return _known_config(path, RunDir.read(path)["config"])

    @property
    def changes(self) -> dict[str, str]:
        """What is not as `run.json` has it, config fields, code and machine, as `old → new`."""
        return self._rounding | self._others

    def describe_changes(self) -> list[str]:
        """The same for a person, in lines."""
        lines = [
            f"`{name}` {change}: no longer bit for bit as the earlier part"
            for name, change in self._rounding.items()
        ]
        others = ", ".join(self._others)
        return [*lines, f"not as the run began: {others}"] if others else lines

    def write_sample(self, step: int, text: str) -> Path:
        """Store a text sample of the model at `step`."""
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        target = folder / f"step-{step:08d}.txt"
        write_durably(target, text)
        return target

    def close(self) -> None:
        """Release the lock; the kernel does the same when the process dies."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def check_run_dir(path: Path, config: RunConfig, *, data_id: str | None) -> dict[str, Any] | None:
    """The `run.json` of the run that would go on in `path`; None where a new one would start.

    Changes nothing. `data_id` None: the data set is not there yet. Raises `ValueError` as
    `RunDir.open` does.
    """
    if (path / "run.json").is_file():
        description = RunDir.read(path)
        _known_config(path, description["config"])
        recipe = config_differences(description["config"], config).recipe
        if recipe:
            changes = "; ".join(f"`{name}`: {change}" for name, change in recipe.items())
            raise ValueError(
                f"Run directory {str(path)!r} holds a run of another config ({changes}); "
                "give this one its own `--run-dir`, or restore those values."
            )
        if data_id is not None and description["data_id"] != data_id:
            raise ValueError(
                f"Run directory {str(path)!r} was trained on data set "
                f"{description['data_id'][:12]}, but the data is now {data_id[:12]}; point "
                "`--data-dir` at the former, or choose another `--run-dir`."
            )
        return description
    if path.exists() and (not path.is_dir() or _foreign_entries(path)):
        raise ValueError(
            f"{str(path)!r} exists and holds no run (no `run.json`); choose an empty or new "
            "`--run-dir`."
        )
    return None


def _known_config(path: str | Path, raw: Mapping[str, Any]) -> RunConfig:
    try:
        return config_from_dict(raw)
    except ValueError as error:
        raise ValueError(
            f"{str(Path(path) / 'run.json')!r} is of another version of matilda-train: "
            f"{str(error).partition('. ')[0]}; use the code that its `git_sha` names."
        ) from None


def _run_meant(path: Path) -> str:
    """What to give instead of `path`, which holds no run."""
    for folder in path.parents[:2]:
        if (folder / "run.json").is_file():
            return f"it lies in the run {str(folder)!r}, so give that."
    runs = {file.parent.name: file.parent for file in path.parent.glob("*/run.json")}
    close = difflib.get_close_matches(path.name, runs, n=1)
    if close:
        return f"did you mean {str(runs[close[0]])!r}?"
    return "train one with `apps/train.py --run-dir`."


def _other_values(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> dict[str, str]:
    """What `new` says differently from `old`, as `old → new`; of names that both have."""
    found: dict[str, str] = {}
    for name in old.keys() & new.keys():
        before, after = old[name], new[name]
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= _other_values(before, after, f"{prefix}{name}.")
        elif before != after:
            found[prefix + name] = f"{before!r} → {after!r}"
    return dict(sorted(found.items()))


def _foreign_entries(path: Path) -> list[str]:
    """Entries that a start cut short by a kill cannot have left behind."""
    ours = ("run.lock", ".run.json.tmp")
    return [entry.name for entry in path.iterdir() if entry.name not in ours]


def _take_lock(path: Path) -> int:
    descriptor = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ValueError(
            f"Another process is training in {str(path)!r}; wait for it or stop it, or choose "
            "another `--run-dir`."
        ) from None
    return descriptor


def _unshare_logs(path: Path) -> None:
    """Append to no file that a copy made with hard links, a backup perhaps, has too."""
    for name in ("metrics.jsonl", "metrics.discarded.jsonl", "events.jsonl"):
        log = path / name
        if log.is_file() and log.stat().st_nlink > 1:
            write_durably(log, log.read_bytes())


def write_durably(target: Path, content: str | bytes) -> None:
    """Put `content` in `target`, whole or not at all, there after a power cut too."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with naming(target), temporary.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_output(target: Path, option: str) -> None:
    """Raise `ValueError`, naming the option that gives it, where no file can be written."""
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(
            f"{str(target)!r} must be a file in a folder that is there; name it by `{option}`."
        )


def write_output(target: Path, text: str) -> None:
    """`write_durably` where a user asked for it: links are followed, no pipe or device replaced."""
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
    else:
        write_durably(target.resolve(), text)
