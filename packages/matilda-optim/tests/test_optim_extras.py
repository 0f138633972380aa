"""Schedulers, batch ramp, QK-Clip, conversions, NorMuon, metrics and the non-finite policy."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import matilda_optim
from matilda_optim import (
    BatchRamp,
    GroupScheduler,
    Muon,
    constant,
    convert_lr,
    convert_state,
    linear_to_zero,
    lr_ratio,
    momentum_warmup,
    orthogonalize,
    qk_clip_,
)

LINEAR = partial(linear_to_zero, total_steps=10)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_groups() -> tuple[list[nn.Parameter], Muon]:
    params = [nn.Parameter(gaussian(16, 32)), nn.Parameter(gaussian(10, 4, seed=1))]
    groups = [
        {"params": params[:1], "name": "hidden", "lr": 0.02, "weight_decay": 0.1},
        {"params": params[1:], "name": "rest", "algorithm": "adamw", "lr": 0.004},
    ]
    return params, Muon(groups)


def test_schedules_differ_by_group_and_by_key() -> None:
    _, optimizer = two_groups()
    scheduler = GroupScheduler(
        optimizer,
        {"muon": LINEAR, "default": constant},
        weight_decay={"hidden": LINEAR, "default": constant},
        momentum=partial(momentum_warmup, warmup_steps=10),
    )
    hidden, rest = optimizer.param_groups
    assert (hidden["lr"], rest["lr"], hidden["momentum"]) == (0.02, 0.004, 0.85)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert hidden["lr"] == pytest.approx(0.01)
    assert hidden["weight_decay"] == pytest.approx(0.05)
    assert hidden["momentum"] == pytest.approx(0.9)
    assert rest["lr"] == 0.004
    with pytest.raises(ValueError, match="no schedule"):
        GroupScheduler(optimizer, {"hidden": LINEAR})


@pytest.mark.parametrize("tensor", [False, True])
def test_a_group_that_is_added_later_joins_the_schedule(tensor: bool) -> None:
    _, optimizer = two_groups()
    schedules = {"hidden": LINEAR, "rest": constant, "late": LINEAR}
    momentum = partial(momentum_warmup, warmup_steps=10)
    scheduler = GroupScheduler(optimizer, schedules, weight_decay=LINEAR, momentum=momentum)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    lr = torch.tensor(0.1) if tensor else 0.1
    late = {"params": [nn.Parameter(gaussian(16, 32))], "name": "late", "lr": lr}
    optimizer.add_param_group(late | {"weight_decay": 0.2})
    optimizer.step()
    scheduler.step()
    group = optimizer.param_groups[-1]
    assert float(group["lr"]) == pytest.approx(0.05)
    assert group["weight_decay"] == pytest.approx(0.1)
    assert group["momentum"] == pytest.approx(0.9)
    assert [float(lr) for lr in scheduler.get_last_lr()] == pytest.approx([0.01, 0.004, 0.05])
    state = scheduler.state_dict()
    scheduler.step()
    scheduler.load_state_dict(state)
    assert float(group["lr"]) == pytest.approx(0.05)
    other = {"params": [nn.Parameter(gaussian(16, 32))], "name": "other"}
    optimizer.add_param_group(other)
    with pytest.raises(ValueError, match="no schedule for the group 'other'"):
        scheduler.step()


def test_a_resumed_scheduler_continues_exactly() -> None:
    _, a = two_groups()
    first = GroupScheduler(a, LINEAR, weight_decay=LINEAR)
    for _ in range(4):
        a.step()
        first.step()
    _, b = two_groups()
    second = GroupScheduler(b, LINEAR, weight_decay=LINEAR)
    b.load_state_dict(a.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        a.step()
        b.step()
        first.step()
        second.step()
        for g, h in zip(a.param_groups, b.param_groups, strict=True):
            assert g["lr"] == h["lr"]
            assert g["weight_decay"] == h["weight_decay"]


def test_a_second_scheduler_starts_from_the_initial_weight_decay() -> None:
    def halved(step: int) -> float:
        return 0.5

    _, optimizer = two_groups()
    optimizer.param_groups[0]["weight_decay"] = 0.2
    for _ in range(3):
        scheduler = GroupScheduler(optimizer, constant, weight_decay=halved)
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
    saved, schedule = optimizer.state_dict(), scheduler.state_dict()

    _, resumed = two_groups()
    resumed.load_state_dict(saved)
    GroupScheduler(resumed, constant, weight_decay=halved)
    assert resumed.param_groups[0]["weight_decay"] == 0.1

    older = copy.deepcopy(saved)
    for group in older["param_groups"]:
        del group["initial_weight_decay"]
    _, other = two_groups()
    again = GroupScheduler(other, constant, weight_decay=halved)
    other.load_state_dict(older)
    again.load_state_dict(schedule)
    other.step()
    again.step()
    assert other.param_groups[0]["weight_decay"] == 0.1


def test_a_scheduler_of_the_learning_rate_leaves_the_weight_decay_to_the_user() -> None:
    _, optimizer = two_groups()
    GroupScheduler(optimizer, LINEAR)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    GroupScheduler(optimizer, LINEAR, weight_decay=constant)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_a_loaded_schedule_fills_a_learning_rate_tensor_and_refuses_other_groups() -> None:
    optimizer = Muon([nn.Parameter(torch.zeros(4, 4))], lr=torch.tensor(0.1))
    lr = optimizer.param_groups[0]["lr"]
    scheduler = GroupScheduler(optimizer, lambda step: 0.5**step)
    state = {**scheduler.state_dict(), "last_epoch": 3}
    scheduler.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.0125)
    _, two = two_groups()
    with pytest.raises(ValueError, match="state is of 1 groups, the optimizer has 2"):
        GroupScheduler(two, LINEAR).load_state_dict(state)


def test_momentum_rises_and_returns() -> None:
    at = partial(momentum_warmup, warmup_steps=10, total_steps=100, cooldown_steps=20)
    assert [at(0), at(10), at(80), at(100)] == pytest.approx([0.85, 0.95, 0.95, 0.85])


def test_a_batch_ramp_is_a_function_of_tokens() -> None:
    ramp = BatchRamp(batch=64, stages=((1000, 128), (5000, 256)))
    assert ramp.at(0) == (64, 1.0)
    assert ramp.at(999)[0] == 64
    assert ramp.at(1000) == (128, pytest.approx(2**0.5))
    assert ramp.at(10**9) == (256, 2.0)
    with pytest.raises(ValueError, match="growing"):
        BatchRamp(batch=64, stages=((1000, 32),))
    with pytest.raises(ValueError, match="increasing"):
        BatchRamp(batch=64, stages=((1000, 128), (1000, 256)))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_qk_clip_shrinks_each_heads_logits_by_exactly_its_factor(kv_heads: int) -> None:
    q, k, x = gaussian(4 * 8, 32), gaussian(kv_heads * 8, 32, seed=1), gaussian(10, 32, seed=2)

    def logits() -> Tensor:
        heads = (x @ q.T).view(10, 4, 8)
        keys = (x @ k.T).view(10, kv_heads, 8).repeat_interleave(4 // kv_heads, dim=1)
        return torch.einsum("the,she->hts", heads, keys)

    before, keys_before = logits(), k.clone()
    tau = before.amax(dim=(1, 2)).sort().values[1].item()
    gamma = qk_clip_(q, k, before.amax(dim=(1, 2)), tau=tau)
    torch.testing.assert_close(logits(), before * gamma[:, None, None], rtol=1e-4, atol=1e-3)
    assert logits().amax() <= tau * 1.0001
    assert gamma.max() == 1.0
    shared = gamma.view(kv_heads, -1).amin(dim=1).sqrt().repeat_interleave(8)
    torch.testing.assert_close(k, keys_before * shared[:, None])
    with pytest.raises(ValueError, match="heads"):
        qk_clip_(q, k[:5], torch.ones(4))
    with pytest.raises(ValueError, match="`tau`"):
        qk_clip_(q, k, torch.ones(4), tau=0.0)


def test_qk_clip_leaves_a_head_whose_logits_were_not_finite() -> None:
    q, k = gaussian(4 * 8, 32), gaussian(4 * 8, 32, seed=1)
    q_before, k_before = q.clone(), k.clone()
    gamma = qk_clip_(q, k, torch.tensor([math.nan, math.inf, 200.0, -math.inf]), tau=100.0)
    assert gamma.tolist() == [1.0, 1.0, 0.5, 1.0]
    for weight, before in ((q, q_before), (k, k_before)):
        expected = before.view(4, 8, 32) * torch.tensor([1, 1, 0.5**0.5, 1]).view(4, 1, 1)
        torch.testing.assert_close(weight.view(4, 8, 32), expected)


@pytest.mark.parametrize("source", [None, "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("target", [None, "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
def test_a_converted_learning_rate_gives_the_same_steps(
    source: str | None, target: str | None, shape: tuple[int, int]
) -> None:
    lr, decay = convert_lr(0.02, 0.1, source=source, target=target, shape=shape)
    p, q = nn.Parameter(gaussian(*shape)), nn.Parameter(gaussian(*shape))
    a = Muon([p], lr=0.02, weight_decay=0.1, adjust_lr_fn=source)
    b = Muon([q], lr=lr, weight_decay=decay, adjust_lr_fn=target)
    for seed in range(3):
        p.grad = gaussian(*shape, seed=seed)
        q.grad = p.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["keller", "moonlight", "dion"])
def test_converted_state_takes_the_step_that_its_source_would_take(source: str) -> None:
    """The source's recurrences, three steps; converted; then one step each."""
    beta, betas, lr = 0.9, (0.9, 0.95), 0.01
    shape = (16, 32)
    weight, table = gaussian(*shape), gaussian(10, 4, seed=1)
    momentum, first, second = torch.zeros(shape), torch.zeros(10, 4), torch.zeros(10, 4)

    def their_step(step: int) -> None:
        g, h = gaussian(*shape, seed=10 + step), gaussian(10, 4, seed=50 + step)
        if source == "keller":
            momentum.lerp_(g, 1 - beta)
            direction = torch.lerp(g, momentum, beta)
        else:
            momentum.mul_(beta).add_(g)
            direction = g + beta * momentum
        ratio = lr_ratio(None, *shape)
        weight.sub_(lr * ratio * orthogonalize(direction, coefficients="keller"))
        first.lerp_(h, 1 - betas[0])
        second.lerp_(h.square(), 1 - betas[1])
        m = first / (1 - betas[0] ** (step + 1))
        v = second / (1 - betas[1] ** (step + 1))
        table.sub_(lr * m / (v.sqrt() + 1e-8))

    for step in range(3):
        their_step(step)
    names = {
        "keller": ("momentum_buffer", "exp_avg", "exp_avg_sq", "momentum"),
        "moonlight": ("momentum_buffer", "moment1", "moment2", "momentum"),
        "dion": ("momentum", "momentum", "variance", "mu"),
    }[source]
    saved = {
        "state": {
            0: {names[1]: first.clone(), names[2]: second.clone(), "step": 3},
            1: {names[0]: momentum.clone()},
        },
        "param_groups": [{"params": [0], names[3]: beta}, {"params": [1], names[3]: beta}],
    }
    p, q = nn.Parameter(weight.clone()), nn.Parameter(table.clone())
    ours = Muon(
        [{"params": [p]}, {"params": [q], "algorithm": "adamw"}],
        lr=lr,
        weight_decay=0.0,
        momentum=beta,
        betas=betas,
    )
    with pytest.raises(ValueError, match="source's order"):
        ours.load_state_dict(convert_state(ours, saved, source=source, params=[p]))
    ours.load_state_dict(convert_state(ours, saved, source=source, params=[q, p]))
    their_step(3)
    p.grad, q.grad = gaussian(*shape, seed=13), gaussian(10, 4, seed=53)
    ours.step()
    torch.testing.assert_close(p.detach(), weight, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(q.detach(), table, rtol=1e-5, atol=1e-6)


def test_an_unknown_source_or_a_foreign_state_is_refused() -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([p])
    with pytest.raises(ValueError, match="`source`"):
        convert_state(optimizer, {}, source="sgd")
    saved = {"state": {0: {"exp_avg": p}}, "param_groups": [{"params": [0], "momentum": 0.9}]}
    with pytest.raises(ValueError, match="no `momentum_buffer`"):
        convert_state(optimizer, saved, source="keller")


def test_normuon_evens_out_rows_and_keeps_the_norm() -> None:
    grad = gaussian(32, 64) * torch.logspace(-3, 0, 32)[:, None]
    plain, normed = nn.Parameter(torch.zeros(32, 64)), nn.Parameter(torch.zeros(32, 64))
    plain.grad, normed.grad = grad.clone(), grad.clone()
    Muon([plain], weight_decay=0.0, ns_coefficients="polar_express").step()
    optimizer = Muon(
        [normed], weight_decay=0.0, ns_coefficients="polar_express", normuon_beta2=0.95
    )
    assert optimizer.state[normed]["second_momentum"].shape == (32, 1)
    optimizer.step()
    torch.testing.assert_close(plain.norm(), normed.norm(), rtol=1e-4, atol=0)
    rows = normed.detach().norm(dim=1)
    assert rows.std() / rows.mean() < 1e-3
    assert plain.detach().norm(dim=1).std() > 10 * rows.std()


def test_normuon_keeps_the_average_of_rows_without_an_update() -> None:
    p = nn.Parameter(torch.zeros(32, 64))
    optimizer = Muon([p], weight_decay=0.0, momentum=0.0, normuon_beta2=0.5)
    p.grad = gaussian(32, 64)
    optimizer.step()
    before, weights = optimizer.state[p]["second_momentum"].clone(), p.detach().clone()
    p.grad = torch.zeros(32, 64)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["second_momentum"], before)
    assert torch.equal(p.detach(), weights)


def test_metrics_describe_the_update_without_changing_anything() -> None:
    params, optimizer = two_groups()
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    report = optimizer.metrics()
    assert list(report) == ["hidden"]
    figures = report["hidden"]
    assert figures["update_rms"].item() == pytest.approx(1 / 32**0.5, rel=0.3)
    assert 0.5 < figures["sigma2_mean"].item() < 1.5
    assert 1 <= figures["effective_rank"].item() <= 16
    assert figures["zero_or_nonfinite"].item() == 0
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_a_non_finite_gradient_follows_the_policy_and_touches_one_matrix(
    value: float, policy: str
) -> None:
    def params() -> list[nn.Parameter]:
        out = [nn.Parameter(gaussian(16, 32, seed=i)) for i in range(4)]
        for i, p in enumerate(out):
            p.grad = gaussian(16, 32, seed=10 + i)
        return out

    clean, dirty = params(), params()
    assert dirty[1].grad is not None
    dirty[1].grad[2, 3] = value
    start = dirty[1].detach().clone()
    Muon(clean, nonfinite=policy).step()
    optimizer = Muon(dirty, nonfinite=policy)
    optimizer.step()
    for i in (0, 2, 3):
        assert torch.equal(clean[i], dirty[i])
    if policy == "skip":
        assert torch.equal(dirty[1], start)
        assert not optimizer.state[dirty[1]]["momentum_buffer"].any()
        dirty[1].grad = gaussian(16, 32)
        optimizer.step()
        assert dirty[1].isfinite().all()
    else:
        assert dirty[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skip_leaves_a_whole_adamw_group_as_it_was(value: float, dtype: torch.dtype) -> None:
    params = [nn.Parameter(gaussian(5, 7, seed=i).to(dtype)) for i in range(3)]
    other = nn.Parameter(gaussian(4, seed=9))
    groups = [
        {"params": params, "algorithm": "adamw", "nonfinite": "skip"},
        {"params": [other], "algorithm": "adamw", "nonfinite": "skip"},
    ]
    optimizer = Muon(groups)

    def step(seed: int) -> None:
        for i, p in enumerate([*params, other]):
            p.grad = gaussian(*p.shape, seed=seed + i).to(p.dtype)
            if seed == 200 and i == 1:
                p.grad.view(-1)[3] = value
        optimizer.step()

    step(100)
    held = [p.detach().clone() for p in params]
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    free = other.detach().clone()
    step(200)
    assert not torch.equal(other, free)
    for p, before, state in zip(params, held, moments, strict=True):
        assert torch.equal(p, before)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())
    step(300)
    assert optimizer.state[params[0]]["step"].item() == 2
    assert not any(torch.equal(p, before) for p, before in zip(params, held, strict=True))


def test_huge_gradients_are_finite_though_their_squares_summed_are_not() -> None:
    p = nn.Parameter(torch.zeros(100))
    optimizer = Muon([{"params": [p], "algorithm": "adamw"}], lr=0.1, nonfinite="skip")
    p.grad = torch.full_like(p, 1e19)
    assert torch.linalg.vector_norm(p.grad, dtype=torch.float32).isinf()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((100,), -0.1))


def test_cautious_decay_acts_only_where_the_update_shrinks_the_entry() -> None:
    p, q = nn.Parameter(gaussian(16, 32)), nn.Parameter(gaussian(16, 32))
    p.grad = gaussian(16, 32, seed=1)
    q.grad = p.grad.clone()
    start = p.detach().clone()
    Muon([p], lr=0.1, weight_decay=0.0).step()
    Muon([q], lr=0.1, weight_decay=0.5, cautious=True).step()
    update = start - p.detach()
    decay = (p - q).detach()
    torch.testing.assert_close(decay, torch.where(start * update > 0, 0.05 * start, 0.0 * start))


def test_the_package_lists_its_public_names_before_they_are_loaded() -> None:
    assert dir(matilda_optim) == sorted(matilda_optim.__all__)
    assert all(getattr(matilda_optim, name) is not None for name in dir(matilda_optim))
