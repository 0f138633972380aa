"""Data sets of the Hugging Face hub to shards: `prepare_hub`.

Files of a pinned revision are fetched one after another, checked against the SHA-256 that the hub
states for them, encoded by row groups, and removed. Only as many files are fetched as the tokens
asked for need. A hub that fails, stalls, truncates or answers nonsense is waited for; killed at any
point, the next call goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matilda_data.contamination import build_evaluation_set
from matilda_data.documents import ReadOptions
from matilda_data.engine import WORK_DIR, Engine, PlannedSource, prepared
from matilda_data.errors import DataError
from matilda_data.hub_client import HubFiles, HubSource, take_over_plans
from matilda_data.inputs import check_lists
from matilda_data.journal import Journal
from matilda_data.manifest import Manifest
from matilda_data.packer import select
from matilda_data.persistence import Retry
from matilda_data.prepare import PathLike, Settings, check_partition, take_over
from matilda_data.progress import Meter, ProgressCallback

__all__ = ["HubSource", "prepare_hub"]


def prepare_hub(
    sources: Sequence[HubSource],
    out_dir: PathLike,
    *,
    target_tokens: int | None,
    tokenizer: str = "gpt2",
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.001,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    deduplicate: bool = True,
    decontaminate: Sequence[PathLike] = (),
    backend: str = "auto",
    runner: str = "local",
    partition: tuple[int, int] | None = None,
    merge: Sequence[PathLike] = (),
    retry: Retry | None = None,
    command: str | None = None,
) -> Manifest:
    """Write hub data sets as verified uint16 shards with a manifest into `out_dir`.

    Each source gives its weight's share of `target_tokens` training tokens, in the order of its
    files and rows, whole documents, exact copies left out. Everything else is as `prepare_text`
    has it: call it again after any interruption; equal requests at equal revisions give equal
    bytes.

    Args:
        sources: what to read; more than one make a mixture.
        target_tokens: training tokens over all sources; None takes everything.
        partition: (i, n) encodes every n-th file from the i-th on, as many as a share of 1/n of
            the tokens needs, into an `out_dir` of its own that `merge` takes; the manifest returned
            is empty and the directory unfinished.
        merge: `out_dir`s of partitions whose work is taken over; what is missing is done here.
        retry: how to wait for a hub that fails; None waits for ever.
        others: as in `prepare_text`.

    Raises:
        DataError: the hub has no such data set, configuration, split or revision (it must say so
            three times); the sources have fewer tokens than asked for; or as in `prepare_text`.
    """
    names = [source.name for source in sources]
    if not sources or len(set(names)) != len(names):
        raise DataError(f"source names {names!r} are not distinct, or there are none")
    if target_tokens is not None and target_tokens < 1:
        raise DataError(f"`target_tokens` is {target_tokens!r}; give a positive number or None")
    check_lists(decontaminate=decontaminate, merge=merge)
    check_partition(partition)
    evaluation = build_evaluation_set(decontaminate) if decontaminate else None
    settings = Settings(
        tokenizer=tokenizer,
        shard_tokens=shard_tokens,
        val_fraction=val_fraction,
        workers=workers,
        runner=runner,
        backend=backend,
        deduplicate=deduplicate,
        read=ReadOptions(
            invalid_utf8="replace", evaluation_sha256=evaluation.sha256 if evaluation else ""
        ),
    )
    preparation = settings.preparation(
        {"target_tokens": target_tokens, "sources": [asdict(source) for source in sources]}
    )
    directory = Path(out_dir)

    def prepare(journal: Journal, earlier: Mapping[str, Any] | None) -> Manifest:
        goal = target_tokens and -(-target_tokens // (partition or (0, 1))[1])
        meter = Meter(progress, goal)
        for other in merge:
            take_over_plans(Path(other) / WORK_DIR, directory / WORK_DIR)
        hub = HubFiles(directory / WORK_DIR / "hub", settings, retry or Retry(), meter)
        try:
            engine = replace(settings.engine(directory, journal, meter), provide=hub.provide)
            for other in merge:
                take_over(Path(other), engine, preparation)
            return _run(engine, hub, sources, target_tokens, preparation, partition, earlier)
        finally:
            hub.close()

    return prepared(directory, preparation, evaluation, command, prepare)


def _run(
    engine: Engine,
    hub: HubFiles,
    sources: Sequence[HubSource],
    target_tokens: int | None,
    preparation: dict[str, Any],
    partition: tuple[int, int] | None,
    earlier: Mapping[str, Any] | None,
) -> Manifest:
    index, count = partition or (0, 1)
    weight = sum(source.weight for source in sources) * count
    files = {}
    for source in sources:
        commit, listed = hub.resolve(source)
        files[source.name] = (commit, listed[index::count])
    planned = [
        PlannedSource(
            name=source.name,
            weight=source.weight,
            origin={
                "kind": "hub",
                "dataset": source.dataset,
                "config": source.config,
                "split": source.split,
                "revision": files[source.name][0],
            },
            train_tokens=None
            if target_tokens is None
            else -(-target_tokens * source.weight // weight),
        )
        for source in sources
    ]
    taken = dict.fromkeys(files, 0)
    while True:
        lacking = _lacking(engine, planned)
        fresh: list[PlannedSource] = []
        for source, plan in zip(sources, planned, strict=True):
            listed = files[source.name][1]
            if source.name not in lacking:
                continue
            if taken[source.name] == len(listed):
                if plan.train_tokens is not None and partition is None:
                    raise DataError(
                        f"source {source.name!r} ends after {lacking[source.name]} of the "
                        f"{plan.train_tokens} training tokens asked for; lower `target_tokens` or "
                        "its weight"
                    )
                continue
            file = listed[taken[source.name]]
            taken[source.name] += 1
            units = hub.plan(source, files[source.name][0], file)
            plan.units += units
            fresh.append(replace(plan, units=units))
        if partition is None and sum(taken.values()) == len(fresh):  # the first files
            engine.refuse_other_text(fresh, earlier)
        if not fresh and partition is not None:
            return Manifest(tokenizer={}, sources=(), shards=(), preparation=preparation)
        if not fresh:
            return engine.publish(planned, preparation)
        for source, plan in zip(sources, planned, strict=True):
            commit, listed = files[source.name]
            so_far, read = lacking.get(source.name, 0), taken[source.name]
            if 1 < read < len(listed) and source.name in lacking:
                # Wanted next unless the file at hand, if like those before, is enough.
                expected = so_far * read // (read - 1)
                if plan.train_tokens is None or expected < plan.train_tokens:
                    hub.look_ahead(source, commit, listed[read])
        engine.expect(fresh)
        engine.encode(fresh)
        hub.remove_files([unit for plan in fresh for _, unit in plan.units])


def _lacking(engine: Engine, planned: Sequence[PlannedSource]) -> dict[str, int]:
    """Sources that need more files, with the training tokens that they have so far."""
    rough = {
        source.name: sum(engine.journal.records[key].tokens for key, _ in source.units)
        for source in planned
    }
    wanted = {source.name: source.train_tokens for source in planned}
    if any((goal := wanted[name]) is None or tokens < goal for name, tokens in rough.items()):
        # Without looking at documents: held-out and copied ones only make it less.
        return {
            name: tokens
            for name, tokens in rough.items()
            if (goal := wanted[name]) is None or tokens < goal
        }
    selections = select(engine.source_parts(planned), engine.parts, engine.pack_options)
    return {
        source.name: selection.train_tokens
        for source, selection in zip(planned, selections, strict=True)
        if not selection.satisfied
    }
