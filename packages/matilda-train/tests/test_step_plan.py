"""What a step number means, and what follows from it: learning rate, decay, momentum, batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matilda_optim import BatchRamp, Muon
from matilda_train import RunConfig, config_from_dict
from matilda_train.batches import Batch
from matilda_train.duration import Duration
from matilda_train.schedules import Schedules
from matilda_train.step_plan import StepPlan

SEQ = 8
growing = st.lists(
    st.tuples(st.integers(1, 400), st.sampled_from(["steps", "tokens"]), st.integers(0, 5)),
    max_size=4,
)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    """A plan with a ramp whose points are made to increase."""
    size, ramp = SEQ * draw(st.integers(1, 5)), []
    plan = StepPlan(tokens_per_step=size, seq_len=SEQ)
    first = size
    for gap, unit, more in draw(growing):
        size += SEQ * more
        last = plan.batch_stages[-1]
        point = (
            f"{last.first_step + gap} steps"
            if unit == "steps"
            else f"{last.tokens_before + gap * last.tokens_per_step - gap % 3} tokens"
        )
        ramp.append(f"{point}: {size}")
        plan = StepPlan(tokens_per_step=first, seq_len=SEQ, batch_ramp=ramp)
    return plan


@settings(deadline=None)
@given(plans())
def test_tokens_of_a_step_are_the_sum_of_all_batches_before_it(plan: StepPlan) -> None:
    total = 0
    for step in range(600):
        assert plan.tokens(step) == total
        assert plan.samples(step) * SEQ == total
        assert plan.batch_size(step) * SEQ == plan.tokens_per_step(step)
        total += plan.tokens_per_step(step)


@settings(deadline=None)
@given(plans(), st.integers(0, 20_000))
def test_a_point_in_tokens_is_the_first_step_that_has_them(plan: StepPlan, tokens: int) -> None:
    step = plan.step_at(Duration(tokens, "tokens"))
    assert plan.tokens(step) >= tokens
    assert step == 0 or plan.tokens(step - 1) < tokens


@settings(deadline=None)
@given(plans())
def test_the_ramp_is_the_optimizer_packages(plan: StepPlan) -> None:
    first, *rest = plan.batch_stages
    ramp = BatchRamp(
        batch=first.tokens_per_step,
        stages=tuple((s.tokens_before, s.tokens_per_step) for s in rest),
    )
    for step in range(500):
        assert ramp.at(plan.tokens(step))[0] == plan.tokens_per_step(step)


@pytest.mark.parametrize(
    ("ramps", "said"),
    [
        ({"batch_ramp": ["64"]}, "POINT: VALUE"),
        ({"batch_ramp": ["5 min: 64"]}, "speed of the machine"),
        ({"batch_ramp": ["5 steps: 60"]}, "multiple of the sequence length (8)"),
        ({"batch_ramp": ["5 steps: 16"]}, "never shrink (from 32)"),
        ({"batch_ramp": ["5 steps: 64", "160 tokens: 80"]}, "not after the change at step 5"),
        ({"batch_ramp": ["5 steps: many"]}, "`train.batch_ramp`: 'many' is no whole number"),
        ({"seq_len_ramp": ["0 steps: 3"]}, "must divide `train.seq_len` (8)"),
        ({"seq_len_ramp": ["0: 2", "10: 4", "320 tokens: 8"]}, "not after the change at step 10"),
        ({"seq_len_ramp": ["soon: 4"]}, "`train.seq_len_ramp`: 'soon' is no duration"),
    ],
)
def test_a_bad_ramp_is_one_sentence(ramps: dict[str, list[str]], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        StepPlan(tokens_per_step=32, seq_len=8, **ramps)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_more_lengths_than_compiled_variants_are_refused() -> None:
    lengths = [f"{n}: {2**n}" for n in range(7)]
    with pytest.raises(ValueError, match="more than 6 lengths"):
        StepPlan(tokens_per_step=64, seq_len=64, seq_len_ramp=lengths)
    StepPlan(tokens_per_step=64, seq_len=64, seq_len_ramp=lengths[2:])


def test_sequence_lengths_hold_from_their_points_on() -> None:
    ramp = ["0: 2", "320 tokens: 4", "20 steps: 8"]
    plan = StepPlan(tokens_per_step=32, seq_len=8, seq_len_ramp=ramp)
    assert [plan.seq_len(step) for step in (0, 9, 10, 19, 20, 99)] == [2, 2, 4, 4, 8, 8]
    assert StepPlan(tokens_per_step=32, seq_len=8, seq_len_ramp=["3: 4"]).seq_len(2) == 8


@settings(max_examples=30, deadline=None)
@given(length=st.sampled_from([1, 2, 3, 4, 6, 12]), micro=st.integers(1, 5))
def test_shorter_sequences_are_the_same_tokens_in_the_same_order(length: int, micro: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 60_000, (5, 13), dtype=np.uint16)
    batch = Batch(torch.from_numpy(tokens.view(np.int16)), b"")
    cpu = torch.device("cpu")
    whole = list(batch.micro_batches(micro, cpu))
    parts = list(batch.micro_batches(micro, cpu, seq_len=length))
    for (inputs, targets), (short_inputs, short_targets) in zip(whole, parts, strict=True):
        assert short_inputs.shape == (len(inputs) * 12 // length, length)
        assert torch.equal(short_inputs.flatten(), inputs.flatten())
        assert torch.equal(short_targets.flatten(), targets.flatten())


def make(optim: dict[str, object], **train: object) -> tuple[RunConfig, Muon, Schedules]:
    config = config_from_dict(
        {
            "model": {"max_seq_len": SEQ},
            "optim": {"warmup_steps": 10, "weight_decay": 0.1, **optim},
            "train": {"total_steps": 100, "tokens_per_step": 4 * SEQ, **train},
        }
    )
    optimizer = Muon([torch.nn.Parameter(torch.zeros(16, 16))], lr=0.02, weight_decay=0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.02
    return config, optimizer, Schedules(config, optimizer)


@settings(deadline=None, max_examples=30)
@given(
    warmup=st.integers(0, 40),
    decay=st.sampled_from([0.0, 0.2, 0.25, 0.5]),
    shape=st.sampled_from(["wsd", "cosine", "constant"]),
    decay_shape=st.sampled_from(["linear", "1-sqrt", "cosine", "power"]),
)
def test_counting_tokens_or_steps_is_the_same_while_the_batch_is(
    warmup: int, decay: float, shape: str, decay_shape: str
) -> None:
    optim = {
        "warmup_steps": warmup,
        "decay_fraction": decay,
        "schedule": shape,
        "decay_shape": decay_shape,
    }
    by_steps = make({**optim, "schedule_by": "steps"})[2]
    by_tokens = make({**optim, "schedule_by": "tokens"})[2]
    for step in range(101):
        assert by_steps.lr_factor(step) == by_tokens.lr_factor(step)


def test_defaults_touch_nothing_but_the_learning_rate() -> None:
    _, optimizer, schedules = make({})
    before = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("lr", "params")}
    for step in range(100):
        schedules.apply(step)
        group = optimizer.param_groups[0]
        assert {k: v for k, v in group.items() if k not in ("lr", "params")} == before
        assert group["lr"] == 0.02 * schedules.lr_factor(step)


def test_weight_decay_and_momentum_follow_their_schedules_from_any_step() -> None:
    optim = {
        "weight_decay_schedule": "linear",
        "final_weight_decay_fraction": 0.5,
        "momentum_warmup_steps": 20,
        "momentum_cooldown_steps": 10,
    }
    _, optimizer, schedules = make(optim)
    group = optimizer.param_groups[0]
    seen = {}
    for step in (0, 10, 20, 50, 95, 50, 0):
        schedules.apply(step)
        values = group["weight_decay"], group["momentum"]
        assert seen.setdefault(step, values) == values
    assert seen[0] == (0.1, pytest.approx(0.85))
    assert seen[10][1] == pytest.approx(0.9)
    assert seen[50] == (pytest.approx(0.1 * 0.75), pytest.approx(0.95))
    assert seen[95][1] == pytest.approx(0.9)


def test_weight_decay_may_follow_the_learning_rate() -> None:
    _, optimizer, schedules = make({"weight_decay_schedule": "lr"})
    for step in (0, 5, 50, 90):
        factor = schedules.apply(step)
        assert optimizer.param_groups[0]["weight_decay"] == 0.1 * factor


def test_weight_decay_does_not_rise_with_the_batch() -> None:
    optim: dict[str, object] = {"weight_decay_schedule": "lr"}
    _, optimizer, schedules = make(optim, batch_ramp=[f"20 steps: {16 * SEQ}"])
    assert schedules.apply(20) == 2.0
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_a_larger_batch_raises_the_learning_rate_by_its_exponent() -> None:
    ramp = (f"20 steps: {16 * SEQ}",)
    schedules = make({}, batch_ramp=list(ramp))[2]
    assert (schedules.lr_factor(19), schedules.lr_factor(20)) == (1.0, 2.0)
    alone = make({"batch_lr_exponent": 0.0}, batch_ramp=list(ramp))[2]
    assert alone.lr_factor(20) == 1.0


def test_counting_tokens_the_decay_begins_where_its_share_of_tokens_begins() -> None:
    optim: dict[str, object] = {"schedule_by": "tokens", "batch_lr_exponent": 0.0}
    config, _, schedules = make(optim, batch_ramp=[f"50 steps: {16 * SEQ}"])
    total = config.plan.tokens(100)
    for step in range(10, 101):
        expected = min(1.0, (total - config.plan.tokens(step)) / (0.2 * total))
        assert schedules.lr_factor(step) == pytest.approx(expected)


def test_every_stage_must_divide_into_micro_steps() -> None:
    config, _, _ = make({}, batch_ramp=[f"50 steps: {6 * SEQ}"], micro_batch_size=2)
    assert [config.grad_accum_steps(1, step) for step in (0, 49, 50)] == [2, 2, 3]
    with pytest.raises(ValueError, match="batch of 6 sequences"):
        config.grad_accum_steps(2)
