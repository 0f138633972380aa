"""Speed figures: the first step apart, the median against the best, GPU health where there is."""

from __future__ import annotations

import time

import pytest
import torch

from matilda_train import config_from_dict
from matilda_train import meter as meter_module
from matilda_train.gpu_health import GpuHealth, throttle_reasons
from matilda_train.meter import Meter, RollingMedian, describe_row

CPU = torch.device("cpu")
CONFIG = config_from_dict(
    {"model": {"max_seq_len": 32}, "train": {"total_steps": 9, "tokens_per_step": 320}}
)


class Clock:
    """The host's clock, which goes on when it is told to: no machine is too slow for a test."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter_module, "time", clock)
    return clock


def take_steps(meter: Meter, clock: Clock, *seconds: float, wait: float = 0.0) -> None:
    """Steps that last `seconds`, the first `wait` of them until the batch is there."""
    for duration in seconds:
        meter.begin_step()
        clock.now += wait
        meter.data_arrived()
        clock.now += duration - wait
        meter.end_step(320, 32)


def test_first_step_of_a_process_is_warm_up_and_not_speed(clock: Clock) -> None:
    meter = Meter(CONFIG, CPU, 1)
    take_steps(meter, clock, 0.5, 0.25, 0.125, wait=0.0625)
    row = meter.measure()
    assert row["step_ms"] == row["step_ms_median"] == 187.5
    assert row["tokens_per_second"] == 640 / 0.375
    assert row["warm_up_seconds"] == 0.5 - 0.1875
    assert row["train_seconds"] == 0.875
    assert row["data_wait_ms"] == 62.5
    take_steps(meter, clock, 0.25)
    row = meter.measure()
    assert "warm_up_seconds" not in row
    assert (row["step_ms"], row["train_seconds"], row["data_wait_ms"]) == (250, 0.25, 0)


def test_a_row_of_the_first_step_alone_leaves_warm_up_to_the_next(clock: Clock) -> None:
    meter = Meter(CONFIG, CPU, 1)
    take_steps(meter, clock, 0.5)
    first = meter.measure()
    assert first["step_ms"] == 500
    assert "warm_up_seconds" not in first
    take_steps(meter, clock, 0.125)
    assert meter.measure()["warm_up_seconds"] == 0.375


def test_abandoned_steps_and_pauses_do_not_count(clock: Clock) -> None:
    meter = Meter(CONFIG, CPU, 1)
    take_steps(meter, clock, 0.25)
    clock.now += 100  # an evaluation
    meter.begin_step()
    clock.now += 10
    meter.data_arrived()
    clock.now += 10
    take_steps(meter, clock, 0.5, wait=0.125)
    row = meter.measure()
    assert row["train_seconds"] == 0.75
    assert row["data_wait_ms"] == 62.5


def test_steps_that_become_slower_are_flagged() -> None:
    recent = RollingMedian()
    assert recent.seconds is None
    for _ in range(30):
        recent.add((320, 32), 0.1)
    assert not recent.has_slowed
    recent.add((320, 32), 0.9)  # a single one is an outlier
    assert not recent.has_slowed
    for _ in range(40):
        recent.add((320, 32), 0.12)
    assert recent.has_slowed
    for _ in range(40):
        recent.add((320, 32), 0.1)
    assert not recent.has_slowed


def test_the_best_is_that_of_twenty_steps_and_no_lucky_few() -> None:
    recent = RollingMedian()
    for seconds in (0.1, 0.1, 0.1, *[0.2] * 40):
        recent.add((320, 32), seconds)
        assert not recent.has_slowed


def test_another_shape_of_batch_is_no_throttling() -> None:
    recent = RollingMedian()
    for seconds, shape in ((0.1, (320, 32)), (0.9, (3200, 32)), (1.8, (3200, 64))):
        for _ in range(30):
            recent.add(shape, seconds)
            assert not recent.has_slowed
        assert recent.seconds == seconds


def test_a_slower_gpu_says_why_and_a_cpu_says_nothing(clock: Clock) -> None:
    meter = Meter(CONFIG, CPU, 1)
    take_steps(meter, clock, *[0.001] * 30)
    meter.measure()
    take_steps(meter, clock, *[0.01] * 30)
    row = {"loss_nats": 2.0} | meter.measure()
    assert "slower" not in describe_row(row)
    assert "slower" not in describe_row(row | {"throttling": False})
    assert describe_row(row | {"throttling": True}).endswith("· slower than before")
    hot = {"throttling": True, "gpu_throttle_reasons": "power cap"}
    assert describe_row(row | hot).endswith("· slower than before (power cap)")


def test_names_of_throttle_reasons() -> None:
    assert throttle_reasons(0x0) == throttle_reasons(0x1) == ""
    assert throttle_reasons(0x44) == "power cap, temperature (hardware)"


def test_without_a_gpu_there_is_no_health_to_read() -> None:
    health = GpuHealth(CPU)
    assert health.read() == {}
    health.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_health_of_a_real_gpu() -> None:
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    health = GpuHealth(torch.device("cuda", 0))
    sample: dict[str, object] = {}
    for _ in range(500):
        sample = sample or health.read()
        time.sleep(0.01)
    health.close()
    assert isinstance(sample["gpu_temperature_celsius"], int)
    assert isinstance(sample["gpu_throttle_reasons"], str)
    watts = sample["gpu_power_watts"]
    assert isinstance(watts, float)
    assert watts > 10
