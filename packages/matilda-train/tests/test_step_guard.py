"""The guard vetoes on the device, bitwise, and its statistics tell a spike from ordinary noise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from matilda_model import Transformer
from matilda_optim import Muon
from matilda_train import config_from_dict
from matilda_train.build import build_model, build_optimizer
from matilda_train.guards import StepGuard, Verdict, clip_gradients

CPU = torch.device("cpu")
SMALL = {
    "model": {
        "vocab_size": 64,
        "d_model": 16,
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 1,
        "max_seq_len": 16,
    },
    "train": {"tokens_per_step": 64},
}


def parts(device: torch.device = CPU) -> tuple[Transformer, Muon]:
    config = config_from_dict(SMALL)
    torch.manual_seed(0)
    model = build_model(config, device, torch.float32)
    return model, build_optimizer(config.optim, model)


def backward(model: Transformer, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (4, 17), generator=generator).to(model.embed.weight.device)
    loss: Tensor = model(ids[:, :-1], ids[:, 1:]).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state.clone()
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)


def snapshot(model: Transformer, optimizer: Muon) -> list[Tensor]:
    return [*tensors(model.state_dict()), *tensors(optimizer.state_dict()["state"])]


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["embed.weight", "norm.weight", "blocks.0.mlp.down.weight"])
def test_step_that_is_not_finite_leaves_every_bit_alone(bad: str, name: str) -> None:
    model, optimizer = parts()
    parameters, guard = list(model.parameters()), StepGuard(CPU)
    for seed in (1, 2):
        clip_gradients(parameters, 1.0, backward(model, seed), guard)
        optimizer.step()
        optimizer.zero_grad()
    before = snapshot(model, optimizer)
    loss = backward(model, 3)
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    gradient.view(-1)[3] = float(bad)
    clip_gradients(parameters, 1.0, loss, guard)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
    assert guard.read().skipped
    # and the next step goes on as if it had not been
    optimizer.zero_grad()
    clip_gradients(parameters, 1.0, backward(model, 3), guard)
    optimizer.step()
    assert not guard.read().skipped
    assert not torch.equal(before[0], next(tensors(model.state_dict())))


def test_loss_that_is_not_finite_vetoes_finite_gradients() -> None:
    model, optimizer = parts()
    before = snapshot(model, optimizer)
    guard = StepGuard(CPU)
    loss = backward(model, 1)
    clip_gradients(list(model.parameters()), 1.0, loss * torch.inf, guard)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
    assert guard.read().objection == "nonfinite"


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_is_that_of_torch_bit_for_bit(max_norm: float) -> None:
    model, _ = parts()
    parameters = list(model.parameters())
    loss = backward(model, 1)
    ours = [p.grad.clone() for p in parameters if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    expected = [p.grad for p in parameters if p.grad is not None]
    for p, gradient in zip(parameters, ours, strict=True):
        p.grad = gradient
    guard = StepGuard(CPU)
    clip_gradients(parameters, max_norm, loss, guard)
    assert guard.read().grad_norm == norm.item()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_no_clipping_leaves_gradients_alone_and_a_parameter_may_have_none() -> None:
    model, _ = parts()
    loss = backward(model, 1)
    model.norm.weight.grad = None
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    guard = StepGuard(CPU)
    clip_gradients(list(model.parameters()), 0.0, loss, guard)
    for p, old in zip(model.parameters(), before, strict=True):
        assert (p.grad is None) == (old is None)
        assert p.grad is None or old is None or torch.equal(p.grad, old)
    names = [name for name, _ in model.named_parameters()]
    assert guard.grad_norms[names.index("norm.weight")] == 0


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device's value."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.is_nonzero,
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_judging_and_clipping_read_nothing_on_the_host() -> None:
    model, _ = parts()
    guard = StepGuard(CPU, policy="skip")
    loss = backward(model, 1)
    with HostReads() as reads:
        clip_gradients(list(model.parameters()), 1.0, loss, guard)
        assert reads.count == 0
        loss.item()  # the counter can count
        assert reads.count == 1


def judge_all(guard: StepGuard, losses: list[float], grad_norm: float = 1.0) -> list[Verdict]:
    verdicts = []
    for loss in losses:
        guard.judge(torch.tensor(loss), torch.tensor([grad_norm]))
        verdicts.append(guard.read())
    return verdicts


@pytest.mark.parametrize(("grad_norm", "spike"), [(1.9, False), (2.1, True)])
def test_a_calm_gradient_norm_has_to_double_before_it_is_a_spike(
    grad_norm: float, spike: bool
) -> None:
    guard = StepGuard(CPU, policy="skip", warmup_steps=100)
    for value in noise(200):
        judge_all(guard, [3.0], grad_norm=1.0 + 0.01 * (value - 4.0))
    (verdict,) = judge_all(guard, [3.0], grad_norm=grad_norm)
    assert verdict.grad_norm_z > 20
    assert (verdict.spike, verdict.skipped) == (spike, spike)


def noise(n: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = (3 + 0.05 * torch.randn(n, generator=generator)).tolist()
    return values


def test_z_score_counts_standard_deviations_once_the_warm_up_is_over() -> None:
    guard = StepGuard(CPU, policy="warn", warmup_steps=50)
    verdicts = judge_all(guard, noise(1000))
    assert all(v.loss_z != v.loss_z for v in verdicts[:50])
    assert not any(v.objection for v in verdicts)
    z = torch.tensor([v.loss_z for v in verdicts[100:]])
    assert abs(z.mean()) < 0.2
    assert 0.8 < z.std() < 1.2


@pytest.mark.parametrize("policy", ["warn", "skip", "off"])
def test_spike_is_found_and_does_not_hide_the_next(policy: str) -> None:
    guard = StepGuard(CPU, policy=policy, warmup_steps=50)
    judge_all(guard, noise(200))
    verdicts = judge_all(guard, [9.0, 3.0, 4.0])
    assert [v.spike for v in verdicts] == [policy != "off", False, policy != "off"]
    assert [v.skipped for v in verdicts] == [policy == "skip", False, policy == "skip"]
    assert [v.consecutive for v in verdicts] == [0, 0, 0], "a spike is finite"


def test_spike_of_the_gradient_norm_alone_is_one() -> None:
    guard = StepGuard(CPU, policy="skip", warmup_steps=50)
    judge_all(guard, noise(100))
    guard.judge(torch.tensor(3.0), torch.tensor([30.0, 40.0]))
    verdict = guard.read()
    assert verdict.spike
    assert verdict.grad_norm == 50.0
    assert verdict.loss_z < 6 < verdict.grad_norm_z


def test_fall_of_the_loss_is_no_spike_and_a_lasting_rise_is_soon_normal() -> None:
    guard = StepGuard(CPU, policy="skip", warmup_steps=50)
    judge_all(guard, noise(200))
    assert not judge_all(guard, [1.0])[0].spike
    risen = judge_all(guard, [x + 2 for x in noise(60, seed=1)])
    assert risen[0].skipped
    assert not any(v.skipped for v in risen[30:])


def test_what_is_not_finite_teaches_nothing_and_is_counted_in_a_row() -> None:
    guard = StepGuard(CPU, policy="warn", warmup_steps=2)
    judge_all(guard, noise(20))
    before = {name: value.clone() for name, value in guard.state_dict().items()}
    verdicts = judge_all(guard, [float("nan"), float("inf"), 3e38])
    assert [v.consecutive for v in verdicts] == [1, 2, 0]
    assert [v.objection for v in verdicts] == ["nonfinite", "nonfinite", "spike"]
    fresh = StepGuard(CPU, policy="warn", warmup_steps=2)
    fresh.load_state_dict(before)
    judge_all(fresh, [float("nan"), float("inf")])
    assert all(
        torch.equal(fresh.state_dict()[k], v) for k, v in before.items() if k != "consecutive"
    )
    assert all(torch.isfinite(value).all() for value in guard.state_dict().values())


def test_statistics_survive_a_round_trip_bit_for_bit() -> None:
    whole = StepGuard(CPU, policy="skip", warmup_steps=5)
    judge_all(whole, noise(30))
    copy = StepGuard(CPU, policy="skip", warmup_steps=5)
    copy.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    more = [*noise(30, seed=2), 9.0, 3.0]
    assert judge_all(whole, more) == judge_all(copy, more)
    judge_all(whole, [float("nan")])
    copy.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    assert judge_all(copy, [float("nan")])[0].consecutive == 2


def test_objections_wait_to_be_read_and_approvals_do_not() -> None:
    guard = StepGuard(CPU)
    assert not guard.objects()
    guard.judge(torch.tensor(1.0), torch.tensor([1.0]))
    assert guard.known
    assert not guard.objects()
    assert not guard.pending
    guard.judge(torch.tensor(1.0), torch.tensor([torch.nan]))
    assert guard.objects()
    assert guard.pending
    assert guard.read().skipped
    assert not guard.objects()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steady_state_on_a_gpu_waits_for_nothing() -> None:
    """A whole step of the loop but for its boundaries, with torch refusing every hidden wait."""
    device = torch.device("cuda", 0)
    model, optimizer = parts(device)
    parameters, guard = list(model.parameters()), StepGuard(device, policy="skip", warmup_steps=2)
    ids = torch.randint(0, 64, (4, 17)).pin_memory()

    def step(factor: float = 1.0) -> bool:
        on_device = ids.to(device, non_blocking=True)
        loss = model(on_device[:, :-1].contiguous(), on_device[:, 1:].contiguous()).loss
        loss.backward()
        if guard.objects():
            optimizer.zero_grad(set_to_none=True)
            return False
        clip_gradients(parameters, 1.0, loss.detach() * factor, guard)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return True

    for _ in range(5):
        assert step()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            assert step()
        weights = [p.detach().clone() for p in parameters]
        assert step(float("nan"))
        assert not guard.known
        # Told in the next step, before its update: the weights are those of the bad step.
        assert not step()
        assert guard.known
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))
    assert guard.read().skipped
    assert step()
