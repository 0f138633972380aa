"""Which documents were in a step's batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matilda_data import BinStream, batch_sha256, documents_of
from matilda_train.batches import chain_hash
from matilda_train.config import RunConfig
from matilda_train.data_source import TokenStream, choose_data_dir, open_streams
from matilda_train.metrics_log import read_rows
from matilda_train.rollback import Rollback, read_rollbacks
from matilda_train.run_dir import RunDir

__all__ = ["StepTrace", "batch_documents", "open_run_stream", "trace_step"]

MOST_BATCHES = 1000
"""Hashed to compare with the metrics; a decay run's first rows may be further from any other."""


@dataclass(frozen=True)
class StepTrace:
    """The batch of one step."""

    step: int
    """Counted from 1, as in `metrics.jsonl`."""
    first_sample: int
    samples: int
    batch_sha256: str
    """Of the batch alone; the metrics' hash is that of all batches so far."""
    matches_metrics: bool | None
    """Whether it is the batch that the metrics' hash of all batches so far was made with; None
    where `metrics.jsonl` has no row of this step or a later one."""
    documents: list[dict[str, Any]]
    """A row for each run of tokens of one document; see `batch_documents`."""


def trace_step(run_dir: str | Path, step: int, *, data_dir: str | Path | None = None) -> StepTrace:
    """The batch that `step` of a run was, or will be, trained on.

    Raises `ValueError` for a directory that holds no run, a step outside it, or another data set.
    """
    run_dir = Path(run_dir)
    config = RunDir.config(run_dir)
    if not 1 <= step <= config.train.total_steps:
        raise ValueError(
            f"Step {step} is not part of this run; give one from 1 to {config.train.total_steps}."
        )
    stream = open_run_stream(run_dir, config, data_dir, read_rollbacks(run_dir))
    first, count = config.plan.samples(step - 1), config.plan.batch_size(step - 1)
    digest = batch_sha256(stream.windows(first, count))
    return StepTrace(
        step=step,
        first_sample=first,
        samples=count,
        batch_sha256=digest,
        matches_metrics=_matches(run_dir, step, digest, config, stream),
        documents=batch_documents(stream, first, count),
    )


def open_run_stream(
    run_dir: Path,
    config: RunConfig,
    data_dir: str | Path | None,
    rollbacks: Sequence[Rollback],
) -> BinStream:
    """The training stream of a run after `rollbacks`; `ValueError` when the data are others."""
    data = choose_data_dir(data_dir, config, run_dir)
    if data_dir is None and not (data / "manifest.json").is_file():
        raise ValueError(
            f"The data of run {str(run_dir)!r} are not in {str(data)!r}; say with `--data-dir` "
            "where they lie now."
        )
    stream, _ = open_streams(config, data)
    expected = RunDir.read(run_dir)["data_id"]
    if stream.data_id != expected:
        raise ValueError(
            f"Data set {str(data)!r} is {stream.data_id[:12]}, but the run was trained on "
            f"{expected[:12]}; point `--data-dir` at that one."
        )
    for rollback in rollbacks:
        stream.leave_out(rollback.skip_from, rollback.skip_to)
    return stream


def batch_documents(stream: TokenStream, first: int, count: int) -> list[dict[str, Any]]:
    """Source, id and offset of every document in samples `first` to `first + count - 1`.

    Each row is a run of `sample`'s tokens [`first`, `stop`) that belong to one document, which the
    run enters after `document_token` of its tokens; the fields are `matilda_data.DocumentSpan`'s.
    Empty for a stream that has no documents.
    """
    if not isinstance(stream, BinStream):
        return []
    return [
        {"sample": sample, **asdict(span)}
        for sample in range(first, first + count)
        for span in documents_of(stream, sample)
    ]


def _matches(
    run_dir: Path, step: int, digest: str, config: RunConfig, stream: BinStream
) -> bool | None:
    """Chains the batches from the last logged step before this one to the next from it on."""
    hashes = {
        row["step"]: row["batch_sha256"]
        for row in read_rows(run_dir / "metrics.jsonl")
        if isinstance(row.get("step"), int) and isinstance(row.get("batch_sha256"), str)
    }
    before = max((logged for logged in hashes if logged < step), default=0)
    after = min((logged for logged in hashes if logged >= step), default=None)
    if after is None or after - before > MOST_BATCHES:
        return None
    chain = hashes.get(before, "0" * 64)
    for each in range(before + 1, after + 1):
        samples, count = config.plan.samples(each - 1), config.plan.batch_size(each - 1)
        own = digest if each == step else batch_sha256(stream.windows(samples, count))
        chain = chain_hash(chain, bytes.fromhex(own))
    return bool(chain == hashes[after])
