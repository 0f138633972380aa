"""What is kept and what goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matilda_ckpt import Checkpointer, Keep
from matilda_ckpt.retention import MIN_KEPT, victims


@dataclass(frozen=True)
class Fake:
    step: int
    sequence: int
    healthy: bool = True
    hour: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"s{self.sequence}"

    @property
    def created(self) -> str:
        return (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=self.hour)).isoformat()


def kept(found: list[Fake], keep: Keep) -> list[int]:
    gone = set(victims(found, keep))
    return [fake.step for fake in found if fake.name not in gone]


def test_last_every_hours_and_best_each_keep_their_own() -> None:
    found = [Fake(i * 10, i, hour=i * 0.5, metrics={"val": abs(i - 4)}) for i in range(1, 13)]
    assert kept(found, Keep(last=3)) == [100, 110, 120]
    assert kept(found, Keep(last=1)) == [110, 120]
    assert kept(found, Keep(last=2, every=50)) == [50, 100, 110, 120]
    assert kept(found, Keep(last=2, hours=2)) == [10, 40, 80, 110, 120]
    assert kept(found, Keep(last=2, best=("val", 1, "min"))) == [40, 110, 120]
    assert kept(found, Keep(last=2, best=("val", 3, "max"))) == [100, 110, 120]
    assert kept(found, Keep(last=2, best=("unknown", 3, "max"))) == [110, 120]


def test_nan_metric_is_never_the_best() -> None:
    found = [Fake(i, i, metrics={"val": float("nan") if i == 1 else i}) for i in range(1, 6)]
    assert kept(found, Keep(last=2, best=("val", 1, "min"))) == [2, 4, 5]


def test_unhealthy_do_not_count_and_stay_while_they_are_evidence() -> None:
    found = [Fake(i, i, healthy=i not in (2, 4, 5)) for i in range(1, 7)]
    assert kept(found, Keep(last=2)) == [3, 4, 5, 6]
    found.append(Fake(7, 7))
    assert kept(found, Keep(last=2)) == [6, 7]


fakes = st.lists(
    st.builds(
        lambda s, h, m, hour: (s, h, m, hour),
        st.integers(0, 50),
        st.booleans(),
        st.floats(),
        st.floats(0, 600),
    ),
    max_size=12,
)
rules = st.builds(
    Keep,
    last=st.integers(1, 5),
    every=st.none() | st.integers(1, 20),
    hours=st.none() | st.floats(0.1, 10),
    best=st.none() | st.tuples(st.just("m"), st.integers(1, 3), st.sampled_from(["min", "max"])),
)


@given(fakes, rules)
def test_two_newest_healthy_always_stay_and_a_second_pass_deletes_nothing(
    raw: list[tuple[int, bool, float, float]], keep: Keep
) -> None:
    found = [Fake(s, i, h, hour, {"m": m}) for i, (s, h, m, hour) in enumerate(raw)]
    gone = set(victims(found, keep))
    healthy = [f for f in found if f.healthy]
    assert not gone & {f.name for f in healthy[-MIN_KEPT:]}
    if len(healthy) < MIN_KEPT:
        assert not gone
    rest = [f for f in found if f.name not in gone]
    assert victims(rest, keep) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last": 0}, "`last`"),
        ({"every": 0}, "`every`"),
        ({"hours": -1.0}, "`hours`"),
        ({"hours": 5e-324}, "`hours`"),
        ({"best": ("m", 0, "min")}, "`best`"),
        ({"best": ("m", 1, "low")}, "`best`"),
        ({"best": ("m", 1)}, "`best`"),
        ({"last": 2.5}, "`last`"),
        ({"last": None}, "`last`"),
        ({"every": "100"}, "`every`"),
        ({"hours": "1"}, "`hours`"),
        ({"best": ("m", 1.5, "min")}, "`best`"),
    ],
)
def test_bad_rules_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Keep(**arguments)  # type: ignore[arg-type]


def test_damaged_survivors_do_not_count_towards_the_two(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, keep=Keep(last=10))
    for step in range(1, 5):
        checkpoints.save(step, {"x": torch.full((100,), step)})
    for step in (3, 4):
        path = tmp_path / f"step-0000000{step}" / "x.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    checkpoints.close()
    with Checkpointer(tmp_path, keep=Keep(last=1)) as again:
        again.save(5, {"x": torch.ones(3)})
        steps = [info.step for info in again.list()]
        assert 5 in steps
        assert 2 in steps
        assert again.restore({}, step=2) is not None


def test_a_survivor_changed_since_it_was_verified_is_verified_again(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=Keep(last=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": torch.full((100,), step)})
        path = tmp_path / "step-00000003" / "x.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        checkpoints.save(4, {"x": torch.full((100,), 4)})
        # 3 and 4 would be enough, were 3 what it was when it was written
        assert [info.step for info in checkpoints.list()] == [4, 3, 2]


@pytest.mark.parametrize("keep", [None, 3, "last"])
def test_a_rule_that_is_none_is_refused_before_anything_is_saved(
    tmp_path: Path, keep: object
) -> None:
    with pytest.raises(ValueError, match="`keep` must be a `Keep`"):
        Checkpointer(tmp_path, keep=keep)  # type: ignore[arg-type]


def test_a_read_only_checkpointer_deletes_and_moves_nothing(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=Keep(last=9)) as checkpoints:
        for step in range(4):
            checkpoints.save(step, {"x": step})
    reader = Checkpointer(tmp_path, read_only=True)
    with pytest.raises(ValueError, match="it cannot delete"):
        reader.retire(Keep(last=1))
    with pytest.raises(ValueError, match="it cannot repair"):
        reader.repair()
    assert len(reader.list()) == 4


def test_a_failed_save_deletes_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, keep=Keep(last=5))
    for step in range(1, 5):
        checkpoints.save(step, {"x": step})
    checkpoints.keep = Keep(last=1)
    with pytest.raises(ValueError, match="pickle"):
        checkpoints.save(5, {"x": object()})
    assert len(checkpoints.list()) == 4
    checkpoints.save(5, {"x": 5})
    assert [info.step for info in checkpoints.list()] == [5, 4]
