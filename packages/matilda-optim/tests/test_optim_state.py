"""State: eager, plain, fp32, matched by name, and exact on resume."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matilda_optim import Muon, param_groups


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The elements as stored; without numpy, which this package does not need."""
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(50, 32), nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32)
    ).to(dtype)


def optimizer_of(model: nn.Module) -> Muon:
    return Muon(param_groups(model, lr=1e-2, weight_decay=0.1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        ids = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / 20)
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    sha = hashlib.sha256()
    for p in model.parameters():
        sha.update(raw_bytes(p.detach()))
        for key in sorted(optimizer.state[p]):
            sha.update(raw_bytes(optimizer.state[p][key]))
    return sha.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_and_loaded_run_continues_bitwise(dtype: torch.dtype) -> None:
    straight, broken = model_of(dtype), model_of(dtype)
    a, b = optimizer_of(straight), optimizer_of(broken)
    train(straight, a, 0, 8)
    train(broken, b, 0, 4)
    file = io.BytesIO()
    torch.save({"model": broken.state_dict(), "optimizer": b.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = model_of(dtype)
    resumed.load_state_dict(saved["model"])
    c = optimizer_of(resumed)
    addresses = [v.data_ptr() for s in c.state.values() for v in s.values()]
    c.load_state_dict(saved["optimizer"])
    assert [v.data_ptr() for s in c.state.values() for v in s.values()] == addresses
    assert digest(resumed, c) == digest(broken, b)
    train(resumed, c, 4, 8)
    assert digest(resumed, c) == digest(straight, a)
    assert all(v.dtype == torch.float32 for s in c.state.values() for v in s.values())


def test_a_normuon_state_continues_bitwise_in_an_optimizer_made_without_it() -> None:
    def normuon(model: nn.Module) -> Muon:
        groups = param_groups(model, lr=1e-2, weight_decay=0.1)
        return Muon(groups, normuon_beta2=0.95)

    straight, broken, resumed = model_of(), model_of(), model_of()
    a, b, c = normuon(straight), normuon(broken), optimizer_of(resumed)
    train(straight, a, 0, 6)
    train(broken, b, 0, 3)
    resumed.load_state_dict(broken.state_dict())
    c.load_state_dict(b.state_dict())
    assert digest(resumed, c) == digest(broken, b)
    train(broken, b, 3, 4)  # the loaded state is a copy
    train(resumed, c, 3, 6)
    assert digest(resumed, c) == digest(straight, a)


def test_state_is_plain_tensors_that_exist_before_the_first_step() -> None:
    model = model_of()
    state = optimizer_of(model).state_dict()
    assert len(state["state"]) == len(list(model.parameters()))
    for values in state["state"].values():
        assert set(values) in ({"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"})
        assert all(type(v) is Tensor for v in values.values())
    names = [n for g in state["param_groups"] for n in g["param_names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


def test_loading_matches_parameters_by_name_in_any_order() -> None:
    model = model_of()
    a = optimizer_of(model)
    train(model, a, 0, 3)
    other = model_of()
    groups = param_groups(other, lr=1e-2, weight_decay=0.1)[::-1]
    for group in groups:
        for key in ("params", "param_names", "reasons"):
            group[key] = group[key][::-1]
    b = Muon(groups)
    b.load_state_dict(a.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key in a.state[p]:
            assert torch.equal(a.state[p][key], b.state[q][key])
    assert [g["name"] for g in b.param_groups] == [g["name"] for g in groups]


def wrapped_by_hand(model: nn.Module) -> nn.Module:
    """The names that DDP of a compiled model with FSDP1 and checkpointed blocks has."""
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = nn.Module()
    for name, child in model.named_children():
        holder, inner = nn.Module(), nn.Module()
        inner._checkpoint_wrapped_module = child
        holder._fsdp_wrapped_module = inner
        wrapped.module._orig_mod.add_module(name, holder)
    return wrapped


@pytest.mark.parametrize("wrap", [torch.compile, wrapped_by_hand])
def test_a_wrapped_model_and_the_plain_one_load_each_others_state(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    model, other = model_of(), model_of()
    a = optimizer_of(model)
    train(model, a, 0, 3)
    b = optimizer_of(wrap(other))
    names = [n for g in b.param_groups for n in g["param_names"]]
    assert all("_orig_mod." in name for name in names)
    b.load_state_dict(a.state_dict())
    other.load_state_dict(model.state_dict())
    assert digest(other, b) == digest(model, a)
    assert [n for g in b.param_groups for n in g["param_names"]] == names
    back = model_of()
    c = optimizer_of(back)
    c.load_state_dict(b.state_dict())
    back.load_state_dict(model.state_dict())
    assert digest(back, c) == digest(model, a)


def test_names_that_only_a_wrappers_part_tells_apart_are_not_mixed_up() -> None:
    def two() -> Muon:
        named = [(name, nn.Parameter(torch.zeros(4, 4))) for name in ("x", "module.x")]
        return Muon(named)

    a, b = two(), two()
    for p, value in zip(a.param_groups[0]["params"], (1.0, 2.0), strict=True):
        a.state[p]["momentum_buffer"].fill_(value)
    b.load_state_dict(a.state_dict())
    momenta = [b.state[p]["momentum_buffer"] for p in b.param_groups[0]["params"]]
    assert [m.mean().item() for m in momenta] == [1.0, 2.0]
    one = Muon([("x", nn.Parameter(torch.zeros(4, 4)))])
    with pytest.raises(ValueError, match=r"unexpected \['module\.x'\]"):
        one.load_state_dict(a.state_dict())


def test_other_parameters_or_groups_are_refused_by_name_and_change_nothing() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    before = digest(model, optimizer)
    renamed = copy.deepcopy(optimizer.state_dict())
    renamed["param_groups"][0]["param_names"][0] = "elsewhere"
    with pytest.raises(ValueError, match="elsewhere"):
        optimizer.load_state_dict(renamed)
    regrouped = Muon(param_groups(model_of(), algorithm="adamw", lr=1.0, weight_decay=0.1))
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(regrouped.state_dict())
    assert digest(model, optimizer) == before


def test_a_state_of_other_shapes_is_refused_and_changes_nothing() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    before, lr = digest(model, optimizer), optimizer.param_groups[0]["lr"]
    wider = nn.Sequential(
        nn.Embedding(50, 32), nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 48)
    )
    state = Muon(param_groups(wider, lr=7.0, weight_decay=0.1)).state_dict()
    with pytest.raises(
        ValueError, match=r"shape \(48, 64\), parameter '3.weight' needs \(32, 64\)"
    ):
        optimizer.load_state_dict(state)
    assert digest(model, optimizer) == before
    assert optimizer.param_groups[0]["lr"] == lr


def test_a_checkpoint_of_torch_muon_loads_and_continues() -> None:
    start = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    theirs = torch.optim.Muon([p], lr=0.03)
    p.grad = torch.randn(16, 32)
    theirs.step()
    ours = Muon([q])
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.03
    assert ours.param_groups[0]["algorithm"] == "muon"
    assert torch.equal(ours.state[q]["momentum_buffer"], theirs.state[p]["momentum_buffer"])
    q.grad = torch.randn(16, 32)
    ours.step()


def test_a_checkpoint_of_torch_muon_leaves_a_fused_weight_fused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 64, bias=False)
            self.mixed = nn.MultiheadAttention(32, 4, bias=False)

    def groups_of(model: nn.Module) -> list[dict[str, object]]:
        return param_groups(model, lr=1e-2, weight_decay=0.1, split={r"qkv": (32, 16, 16)})

    torch.manual_seed(0)
    model = Attention()
    theirs = torch.optim.Muon([{"params": group["params"]} for group in groups_of(model)], lr=0.5)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    theirs.step()
    saved = theirs.state_dict()
    twin = copy.deepcopy(model)
    ours, straight = Muon(groups_of(model)), Muon(groups_of(twin))
    before = [dict(group) for group in ours.param_groups]
    ours.load_state_dict(saved)
    for i, group in enumerate(ours.param_groups):
        assert group["lr"] == 0.5
        for key in ("name", "split", "heads", "stacked", "reasons", "param_names"):
            assert group[key] == before[i][key]
        other = straight.param_groups[i]
        other.update({k: v for k, v in saved["param_groups"][i].items() if k != "params"})
        for p, q in zip(group["params"], other["params"], strict=True):
            straight.state[q]["momentum_buffer"].copy_(theirs.state[p]["momentum_buffer"])
            q.grad = p.grad
    ours.step()
    straight.step()
    assert digest(model, ours) == digest(twin, straight)


def test_hooks_change_what_is_loaded_and_see_what_was_loaded() -> None:
    model = model_of()
    a = optimizer_of(model)
    train(model, a, 0, 2)
    saved = copy.deepcopy(a.state_dict())
    for group in saved["param_groups"]:
        group["param_names"] = ["old." + name for name in group["param_names"]]
    b = optimizer_of(model_of())
    seen: list[float] = []

    def rename(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [
            {**group, "param_names": [name.removeprefix("old.") for name in group["param_names"]]}
            for group in state["param_groups"]
        ]
        return {**state, "param_groups": groups}

    def double(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state["state"] = {
            i: {key: 2 * value for key, value in values.items()}
            for i, values in state["state"].items()
        }

    def note(optimizer: torch.optim.Optimizer) -> None:
        seen.extend(v.sum().item() for s in optimizer.state.values() for v in s.values())

    hooks = [b.register_load_state_dict_pre_hook(hook) for hook in (rename, double)]
    b.register_load_state_dict_post_hook(note)
    b.load_state_dict(saved)
    for own, other in zip(b.state.values(), a.state.values(), strict=True):
        assert all(torch.equal(own[key], 2 * other[key]) for key in other)
    assert seen == [v.sum().item() for s in b.state.values() for v in s.values()]
    for hook in hooks:
        hook.remove()
    b.load_state_dict(a.state_dict())  # nothing of the first load is left
    for own, other in zip(b.state.values(), a.state.values(), strict=True):
        assert all(torch.equal(own[key], other[key]) for key in other)


def test_keys_that_json_turned_into_strings_load() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    state["state"] = {str(k): v for k, v in state["state"].items()}
    for group in state["param_groups"]:
        if group["algorithm"] == "adamw":
            group["betas"] = list(group["betas"])
    other = model_of()
    again = optimizer_of(other)
    again.load_state_dict(state)
    other.load_state_dict(model.state_dict())
    assert digest(other, again) == digest(model, optimizer)
    train(other, again, 2, 3)


@pytest.mark.slow  # the everyday form is in test_optim_distributed.py, which starts one anyway
def test_another_process_gives_equal_bits() -> None:
    program = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[2]));"
        "sys.path.insert(0, sys.argv[1]);"
        "import test_optim_state as t;"
        "m = t.model_of(); o = t.optimizer_of(m); t.train(m, o, 0, 3); print(t.digest(m, o))"
    )
    arguments = [str(Path(__file__).parent), str(torch.get_num_threads())]
    other = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 3)
    assert other.stdout.strip() == digest(model, optimizer)


def test_a_pickled_copy_behaves_the_same() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, 4)
    train(twin_model, twin, 2, 4)
    assert digest(model, optimizer) == digest(twin_model, twin)


def test_an_optimizer_is_freed_with_its_last_reference() -> None:
    p = torch.nn.Parameter(torch.randn(8, 8))
    p.grad = torch.randn(8, 8)
    optimizer = Muon([p])
    optimizer.step()
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
