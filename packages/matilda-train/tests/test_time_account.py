"""The account of a run's time, against histories whose every second is known."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matilda_train.time_account import account_time, describe_lost_work, goodput

STEP, EVALUATION, SAVE, START, RESTORE, WARM_UP = 2.0, 5.0, 1.0, 7.0, 3.0, 11.0
EVALUATE_EVERY, SAVE_EVERY, LOG_EVERY = 6, 4, 2


@dataclass
class History:
    """Writes the files that a run with these costs would write, and knows the truth."""

    events: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    truth: dict[str, float] = field(default_factory=dict)
    clock: float = 0.0
    lives: int = 0

    def spend(self, phase: str, bucket: str, seconds: float) -> None:
        self.clock += seconds
        self.table[phase] = self.table.get(phase, 0.0) + seconds
        self.truth[bucket] = self.truth.get(bucket, 0.0) + seconds

    def event(self, name: str, **fields: Any) -> None:
        time = datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self.clock)
        row = {"time": time.isoformat(), "event": name, "seconds": dict(self.table)}
        self.events.append(row | fields)

    def row(self, step: int, **fields: Any) -> None:
        uptime = self.clock - self.born
        self.rows.append({"step": step, "restarts": self.lives, "uptime_seconds": uptime} | fields)

    def live(self, first: int, last: int, *, killed: bool) -> None:
        """A process restores step `first`, trains to `last`, and is killed or stops cleanly."""
        self.table: dict[str, float] = {}
        self.born = self.clock
        self.spend("starting", "starting", START)
        kept = [row for row in self.rows if row["step"] <= first]
        lost = [row for row in self.rows if row["step"] > first]
        self.rows = kept
        self.spend("restoring", "restoring", RESTORE)
        self.event("resume" if first else "start", step=first, **describe_lost_work(lost))
        unlogged = 0
        for step in range(first, last):
            slow = WARM_UP if step == first else 0.0
            self.spend("training", "warming up", slow)
            self.spend("training", "productive", STEP)
            unlogged += 1
            done = step + 1
            if done % LOG_EVERY == 0:
                fresh = {"warm_up_seconds": WARM_UP} if done - unlogged == first else {}
                spent = STEP * unlogged + sum(fresh.values())
                self.row(done, loss_nats=1.0, step_ms=1e3 * STEP, train_seconds=spent, **fresh)
                unlogged = 0
            if done % EVALUATE_EVERY == 0:
                self.spend("evaluating", "evaluating", EVALUATION)
                self.row(done, val_loss_nats=1.0, eval_seconds=EVALUATION)
            if done % SAVE_EVERY == 0 or (done == last and not killed):
                self.spend("saving", "saving", SAVE)
                self.event("save", step=done)
        if not killed:
            self.event("preempted", step=last)
        self.lives += 1


def test_account_of_a_clean_stop_is_exact() -> None:
    history = History()
    history.live(0, 12, killed=False)
    history.clock += 100.0
    history.truth["between lives"] = 100.0
    history.live(12, 24, killed=False)
    account = account_time(history.events, history.rows)
    assert account.restarts == 1
    assert account.wall_seconds == pytest.approx(history.clock)
    known = {name: seconds for name, seconds in account.seconds.items() if seconds}
    assert known == pytest.approx(history.truth)
    assert account.fraction == pytest.approx(24 * STEP / history.clock)


def test_steps_redone_after_a_kill_are_lost() -> None:
    history = History()
    history.live(0, 7, killed=True)  # step 4 is durable, rows reach to step 6
    history.live(4, 12, killed=False)
    account = account_time(history.events, history.rows)
    assert account.seconds["productive"] == pytest.approx(12 * STEP)
    assert account.seconds["redone"] == pytest.approx(2 * STEP + EVALUATION)
    # Step 7 left no trace in the files.
    assert account.wall_seconds == pytest.approx(history.clock)
    assert account.seconds["between lives"] == pytest.approx(STEP)


def test_an_evaluation_that_a_kill_undid_is_counted_once() -> None:
    history = History()
    history.live(0, 7, killed=True)
    history.event("save", step=4)  # written in the background, acknowledged after the evaluation
    history.live(4, 12, killed=False)
    account = account_time(history.events, history.rows)
    assert account.seconds["redone"] == pytest.approx(2 * STEP + EVALUATION)
    assert account.seconds["evaluating"] == pytest.approx(2 * EVALUATION)
    assert account.seconds["productive"] == pytest.approx(12 * STEP)


def test_steps_that_a_checkpoint_kept_but_no_row_tells_of_are_productive() -> None:
    history = History()
    history.live(0, 9, killed=False)
    history.live(9, 12, killed=False)
    account = account_time(history.events, history.rows)
    assert account.seconds["productive"] == pytest.approx(12 * STEP)
    assert account.wall_seconds == pytest.approx(history.clock)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.floats(0, 1e4)), max_size=6),
    st.randoms(use_true_random=False),
)
def test_every_second_is_in_one_bucket(lives: list[tuple[int, bool, float]], draw: Any) -> None:
    history = History()
    durable = 0
    for steps, killed, gap in lives:
        last = durable + steps
        history.live(durable, last, killed=killed)
        durable = max(durable, last // SAVE_EVERY * SAVE_EVERY) if killed else last
        history.clock += gap
    # Whatever a reader finds half-written or damaged, the account stands.
    for row in [*history.events, *history.rows]:
        if draw.random() < 0.05:
            row.pop(draw.choice(sorted(row)))
    account = account_time(history.events, history.rows)
    assert sum(account.seconds.values()) == pytest.approx(account.wall_seconds)
    assert min(account.seconds.values()) >= 0
    assert account.fraction is None or 0 <= account.fraction <= 1
    assert account.table()


def test_a_calendar_that_jumps_within_a_life_changes_nothing() -> None:
    history = History()
    history.live(0, 12, killed=False)
    before = account_time(history.events, history.rows)
    for event in history.events[1:]:
        event["time"] = "1999-01-01T00:00:00+00:00"
    assert account_time(history.events, history.rows) == before


def test_a_calendar_set_back_between_lives_leaves_no_gap() -> None:
    history = History()
    history.live(0, 12, killed=False)
    worked = history.clock
    history.clock -= 10_000.0
    history.live(12, 24, killed=False)
    account = account_time(history.events, history.rows)
    assert account.seconds["between lives"] == 0
    assert account.wall_seconds == pytest.approx(worked + history.clock + 10_000 - worked)


def test_a_refused_step_is_not_productive() -> None:
    history = History()
    history.live(0, 4, killed=False)
    history.rows[-1]["skipped"] = True
    # unexplained time: without it, what is counted twice is taken off again as beyond the whole
    history.spend("training", "other", 100.0)
    history.event("finish", step=4)
    account = account_time(history.events, history.rows)
    assert account.seconds["skipped"] == pytest.approx(STEP)
    assert account.seconds["productive"] == pytest.approx(3 * STEP)
    assert account.seconds["other"] == pytest.approx(100.0)


def test_evaluations_that_no_row_times_are_those_of_the_phases() -> None:
    history = History()
    history.live(0, 12, killed=False)
    for row in history.rows:
        row.pop("eval_seconds", None)
    account = account_time(history.events, history.rows)
    assert account.seconds["evaluating"] == pytest.approx(2 * EVALUATION)


@pytest.mark.parametrize(("idle", "left"), [(0.0, 50.0), (20.0, 30.0), (80.0, 0.0)])
def test_a_pause_that_was_nobodys_fault_is_taken_off_as_far_as_it_was_one(
    idle: float, left: float
) -> None:
    history = History()
    history.live(0, 4, killed=False)
    history.clock += 50.0
    history.live(4, 8, killed=False)
    whole = account_time(history.events, history.rows)
    account = whole.without_idle(idle)
    assert account.seconds["between lives"] == pytest.approx(left)
    assert account.wall_seconds == pytest.approx(whole.wall_seconds - (50.0 - left))
    assert sum(account.seconds.values()) == pytest.approx(account.wall_seconds)


def test_a_number_that_overflows_in_a_damaged_file_counts_as_nothing(tmp_path: Path) -> None:
    damaged = '"last_seen": {"restarts": 1e400, "uptime_seconds": -1e400}, "lost_seconds": 1e400'
    (tmp_path / "events.jsonl").write_text(
        '{"time": "2026-01-01T00:00:00+00:00", "event": "start", "seconds": {"starting": 2.0}}\n'
        f'{{"time": "2026-01-01T00:00:10+00:00", "event": "resume", {damaged}}}\n'
    )
    account = goodput(tmp_path)
    assert account.wall_seconds == pytest.approx(12)
    assert account.seconds["redone"] == 0


def test_files_of_an_older_run_or_none_at_all(tmp_path: Path) -> None:
    assert goodput(tmp_path).fraction is None
    (tmp_path / "events.jsonl").write_text(
        '{"time": "2026-01-01T00:00:00+00:00", "event": "start", "step": 0}\n'
        '{"time": "2026-01-01T00:01:40+00:00", "event": "save", "step": 4}\n{"time'
    )
    rows = [{"step": step, "loss_nats": 1.0, "step_ms": 20_000.0} for step in (2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    account = goodput(tmp_path)
    assert account.wall_seconds == 100
    assert account.seconds["productive"] == pytest.approx(80)
    assert "80.0 %" in account.table()
