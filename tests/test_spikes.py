"""A batch of noise in the middle of a run, under each policy; rollbacks are killed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from killable_runs import TrainServer, state_sha256
from matilda_train import load_config
from matilda_train.metrics_log import read_rows
from matilda_train.rollback import Rollback, is_restorable, read_rollbacks
from matilda_train.run_comparison import state_hashes, untimed_rows
from matilda_train.trace import open_run_stream

SPIKE = 19
POISON: dict[str, Any] = {"poisoned_samples": [8 * (SPIKE - 1), 8 * SPIKE]}
# The loss still falls fast, so its running mean is high: a jump back to the beginning is only two
# deviations above it, and every other step is one below.
SHORT = [
    "train.total_steps=24",
    "train.spike_warmup_steps=16",
    "train.spike_threshold=1.0",
    "train.rollback_margin_steps=2",
    "ckpt.every_steps=4",
    "eval.every_steps=12",
]


def choose(policy: str, *more: str) -> dict[str, Any]:
    return {"set": [*SHORT, f"train.spike_policy={policy}", *more], **POISON}


def steps_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in untimed_rows(run_dir) if "loss_nats" in row}


def event_names(run_dir: Path) -> list[str]:
    return [row["event"] for row in read_rows(run_dir / "events.jsonl")]


def weights(run_dir: Path) -> dict[str, str]:
    hashes = state_hashes(run_dir)
    return {name: value for name, value in hashes.items() if name.startswith(("/model", "/opt"))}


@pytest.fixture(scope="module")
def rolled_back(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that met the spike, rolled back and finished, undisturbed otherwise."""
    run_dir = tmp_path_factory.mktemp("rolled") / "run"
    code = server.run(tiny_config, run_dir, corpus, **choose("rollback"))
    assert code == 0, server.log.read_text()
    return run_dir


def test_warning_tells_of_the_spike_and_changes_nothing(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    warned, off = tmp_path / "warned", tmp_path / "off"
    assert server.run(tiny_config, warned, corpus, **choose("warn")) == 0
    assert server.run(tiny_config, off, corpus, **choose("off")) == 0
    assert state_sha256(warned) == state_sha256(off)
    assert untimed_rows(warned) == untimed_rows(off)
    spikes = [row for row in read_rows(warned / "events.jsonl") if row["event"] == "spike"]
    assert [(row["step"], row["skipped"]) for row in spikes] == [(SPIKE, False)]
    assert spikes[0]["loss_z"] > 1.5
    assert "spike" not in event_names(off)


def test_skipped_spike_leaves_the_weights_and_takes_the_next_batch(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # Stopped at the step before and at the one after the spike: the weights are the same.
    stop = choose("skip") | {"signal": "SIGTERM"}
    spike = {"name": "spike", "after": True}
    assert server.run(tiny_config, run_dir, corpus, **stop, at_step=SPIKE - 1) == 75
    before = weights(run_dir)
    assert server.run(tiny_config, run_dir, corpus, **stop, at_event=spike) == 75
    rows = steps_of(run_dir)
    assert max(rows) == SPIKE
    assert rows[SPIKE]["skipped"]
    assert weights(run_dir) == before
    assert server.run(tiny_config, run_dir, corpus, **choose("skip")) == 0
    assert [step for step, row in steps_of(run_dir).items() if row["skipped"]] == [SPIKE]


def test_rollback_returns_before_the_window_and_leaves_its_samples_out(
    rolled_back: Path, tiny_config: Path, corpus: Path
) -> None:
    assert [e for e in event_names(rolled_back) if e not in ("save", "start")] == [
        "spike",
        "rollback",
        "rolled_back",
        "finish",
    ]
    rollback = read_rollbacks(rolled_back)[0]
    assert (rollback.step, rollback.undone_from) == (SPIKE, SPIKE - 2)
    # Steps 17 to 21 would have seen the samples 128 to 167: nothing does.
    assert (rollback.skip_from, rollback.skip_to) == (8 * (SPIKE - 3), 8 * (SPIKE + 2))
    rows = steps_of(rolled_back)
    assert list(rows) == list(range(1, 25))
    assert not any(row["skipped"] for row in rows.values())
    discarded = read_rows(rolled_back / "metrics.discarded.jsonl")
    assert [row["step"] for row in discarded] == [17, 18, SPIKE]
    config = load_config(tiny_config, SHORT)
    plain = open_run_stream(rolled_back, config, corpus, [])
    after = open_run_stream(rolled_back, config, corpus, [rollback])
    assert np.array_equal(after.windows(0, 128), plain.windows(0, 128))
    assert np.array_equal(after.windows(128, 64), plain.windows(168, 64))


@pytest.mark.parametrize(
    "faults",
    [
        [
            {"at_event": {"name": "rollback", "after": False}},
            {"at_event": {"name": "rollback", "after": True}},
        ],
        [{"at_phase": "restoring", "occurrence": 2, "signal": "SIGKILL"}],
        pytest.param(
            [{"at_event": {"name": "rolled_back", "after": False}}, {"at_step": 2}],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["around the decision", "while restoring", "with the rows moved, and again"],
)
def test_run_killed_in_a_rollback_ends_in_the_same_bits(
    faults: list[dict[str, Any]],
    server: TrainServer,
    tiny_config: Path,
    corpus: Path,
    rolled_back: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    for fault in faults:
        assert server.run(tiny_config, run_dir, corpus, **choose("rollback"), **fault) == -9
    assert server.run(tiny_config, run_dir, corpus, **choose("rollback")) == 0
    assert len(read_rollbacks(run_dir)) == 1
    assert state_sha256(run_dir) == state_sha256(rolled_back)
    assert untimed_rows(run_dir) == untimed_rows(rolled_back)


def test_checkpoint_inside_the_window_is_not_returned_to(
    server: TrainServer, tiny_config: Path, corpus: Path, rolled_back: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    stop = choose("rollback") | {"at_step": SPIKE - 1, "signal": "SIGTERM"}
    assert server.run(tiny_config, run_dir, corpus, **stop) == 75
    saves = [e["step"] for e in read_rows(run_dir / "events.jsonl") if e["event"] == "save"]
    assert saves[-1] in (SPIKE - 2, SPIKE - 1)
    assert server.run(tiny_config, run_dir, corpus, **choose("rollback")) == 0
    assert state_sha256(run_dir) == state_sha256(rolled_back)
    assert untimed_rows(run_dir) == untimed_rows(rolled_back)


def test_spike_after_too_many_rollbacks_ends_the_run(
    server: TrainServer, tiny_config: Path, corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    server.log.write_text("")
    code = server.run(tiny_config, run_dir, corpus, **choose("rollback", "train.max_rollbacks=0"))
    assert code == 3
    assert "spiked again in step 19, after 0 rollbacks" in server.log.read_text()
    assert event_names(run_dir)[-1] == "diverged"


def test_ranks_roll_back_alike(
    server: TrainServer, tiny_config: Path, corpus: Path, rolled_back: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert server.run(tiny_config, run_dir, corpus, ranks=2, **choose("rollback")) == 0
    assert read_rollbacks(run_dir) == read_rollbacks(rolled_back)
    one, two = steps_of(rolled_back), steps_of(run_dir)
    assert [row["batch_sha256"] for row in two.values()] == [
        row["batch_sha256"] for row in one.values()
    ]


def test_which_checkpoints_a_rollback_undoes() -> None:
    class Saved:
        healthy, problem = True, None

        def __init__(self, step: int, sequence: int) -> None:
            self.step, self.sequence = step, sequence

    first = Rollback(step=50, undone_from=42, sequence=5, skip_from=0, skip_to=1)
    second = Rollback(step=90, undone_from=82, sequence=9, skip_from=2, skip_to=3)
    assert is_restorable(Saved(41, 4), [first])
    assert not is_restorable(Saved(42, 5), [first])
    assert is_restorable(Saved(42, 6), [first])
    assert not is_restorable(Saved(85, 8), [first, second])
    assert is_restorable(Saved(85, 10), [first, second])
    # What the run was before the second rollback: nothing saved after it belongs to that.
    assert is_restorable(Saved(85, 8), [first], undone_by=second)
    assert not is_restorable(Saved(85, 10), [first], undone_by=second)
