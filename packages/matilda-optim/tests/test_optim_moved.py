"""State that is made at once follows parameters that are moved, cast or exchanged afterwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from matilda_optim import Muon


def model_of(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).to(device)


def optimizer_of(model: nn.Module) -> Muon:
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    vectors = [(n, p) for n, p in model.named_parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "normuon_beta2": 0.9},
        {"params": vectors, "algorithm": "adamw"},
    ]
    return Muon(groups, lr=0.02)


def train(model: nn.Module, optimizer: Muon, first: int, last: int) -> None:
    for step in range(first, last):
        g = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g).to(p)
        optimizer.step()


def assert_same(model: nn.Module, optimizer: Muon, other: nn.Module, theirs: Muon) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == theirs.state[q].keys()
        assert all(torch.equal(v, theirs.state[q][k]) for k, v in optimizer.state[p].items())


def devices(optimizer: Muon) -> set[str]:
    return {v.device.type for state in optimizer.state.values() for v in state.values()}


@pytest.fixture
def moves_in_place() -> Iterator[None]:
    """`Module.to` keeps its Parameter objects between cpu and meta, as between cpu and cuda."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("moves_in_place")
def test_a_model_moved_after_the_optimizer_was_made_trains_as_one_moved_before() -> None:
    model = model_of("meta")
    weight = model[0].weight
    optimizer = optimizer_of(model)
    assert devices(optimizer) == {"meta"}
    model.to_empty(device="cpu")
    assert model[0].weight is weight
    model.load_state_dict(model_of().state_dict())
    train(model, optimizer, 0, 3)
    straight = model_of()
    theirs = optimizer_of(straight)
    train(straight, theirs, 0, 3)
    assert_same(model, optimizer, straight, theirs)


@pytest.mark.usefixtures("moves_in_place")
def test_a_load_puts_the_state_where_the_parameters_are() -> None:
    """Accelerate's prepare: the model is moved, then a moved state is loaded."""
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 1)
    model.to("meta")
    state = optimizer.state_dict()
    state["state"] = {
        i: {key: value.to("meta") for key, value in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict(state)
    assert devices(optimizer) == {"meta"}


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_cast_after_the_optimizer_was_made_trains_as_one_cast_before(loaded: bool) -> None:
    model, straight = model_of(), model_of().double()
    optimizer, theirs = optimizer_of(model), optimizer_of(straight)
    model.double()
    if loaded:
        train(straight, theirs, 0, 2)
        model.load_state_dict(straight.state_dict())
        optimizer.load_state_dict(theirs.state_dict())
        assert_same(model, optimizer, straight, theirs)
    train(straight, theirs, 2, 4)
    train(model, optimizer, 2, 4)
    assert_same(model, optimizer, straight, theirs)
    for p in model.parameters():
        wide = {k for k, v in optimizer.state[p].items() if v.dtype == torch.float64}
        assert wide == optimizer.state[p].keys() - {"step", "second_momentum"}


@pytest.mark.parametrize("between", ["step", "state_dict", "load_state_dict", "metrics"])
def test_parameters_exchanged_in_the_groups_get_state_and_the_old_ones_lose_theirs(
    between: str,
) -> None:
    """Accelerate's fsdp2_switch_optimizer_parameters, before the first step."""
    model, straight = model_of(), model_of()
    optimizer, theirs = optimizer_of(model), optimizer_of(straight)
    new = model_of()
    names = dict(new.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [names[name] for name in group["param_names"]]
    if between == "state_dict":
        assert optimizer.state_dict()["state"].keys() == set(range(4))
    elif between == "load_state_dict":
        optimizer.load_state_dict(theirs.state_dict())
    elif between == "metrics":
        optimizer.metrics()
    train(new, optimizer, 0, 2)
    train(straight, theirs, 0, 2)
    assert_same(new, optimizer, straight, theirs)
    assert set(map(id, optimizer.state)) == set(map(id, new.parameters()))


def clear(optimizer: Muon) -> None:
    optimizer.state.clear()


def replace(optimizer: Muon) -> None:
    optimizer.state = defaultdict(dict)


def replace_each(optimizer: Muon) -> None:
    for p in list(optimizer.state):
        optimizer.state[p] = {}


@pytest.mark.parametrize("reset", [clear, replace, replace_each])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_cleared_state_starts_again_from_nothing(
    reset: Callable[[Muon], None], steps: int
) -> None:
    model, straight = model_of(), model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, steps)
    straight.load_state_dict(model.state_dict())
    theirs = optimizer_of(straight)
    reset(optimizer)
    train(model, optimizer, 5, 7)
    train(straight, theirs, 5, 7)
    assert_same(model, optimizer, straight, theirs)


def test_a_state_cleared_before_a_load_is_loaded_in_full() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    twin = model_of()
    twin.load_state_dict(model.state_dict())
    fresh = optimizer_of(twin)
    fresh.state.clear()
    fresh.load_state_dict(saved)
    assert_same(model, optimizer, twin, fresh)


def test_a_cleared_state_is_forgotten_by_the_kernels_plan() -> None:
    optimizer = optimizer_of(model_of())
    optimizer.step()
    optimizer._muon_step._key = "a plan's"
    optimizer._settle()
    assert optimizer._muon_step._key == "a plan's"
    clear(optimizer)
    optimizer._settle()
    assert optimizer._muon_step._key is None


def test_a_parameter_taken_out_of_its_group_for_a_while_keeps_its_state() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    group = optimizer.param_groups[0]
    frozen = group["params"].pop()
    momentum = optimizer.state[frozen]["momentum_buffer"]
    train(model, optimizer, 2, 3)
    group["params"].append(frozen)
    assert optimizer.state[frozen]["momentum_buffer"] is momentum
    train(model, optimizer, 3, 4)


def test_state_tensors_that_are_in_place_keep_their_addresses() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    held = {id(v) for state in optimizer.state.values() for v in state.values()}
    train(model, optimizer, 0, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2, 3)
    assert {id(v) for state in optimizer.state.values() for v in state.values()} == held


@pytest.mark.parametrize("which", ["parameter", "momentum", "gradient"])
def test_the_kernels_are_never_given_an_address_of_another_device(which: str) -> None:
    pytest.importorskip("triton")
    from matilda_optim.triton_backend import KernelClass, KernelKey, Matrix

    def on(name: str) -> Tensor:
        return torch.zeros(64, 64, device="meta" if which == name else "cpu")

    class Moved:
        """A parameter and its gradient, which torch lets differ only while a model moves."""

        def __init__(self) -> None:
            self.tensor, self.grad = on("parameter"), on("gradient")
            self.device, self.shape = self.tensor.device, self.tensor.shape

        def data_ptr(self) -> int:
            return self.tensor.data_ptr()

    half = torch.float16
    key = KernelKey(
        64, 64, torch.device("cpu"), torch.float32, torch.float32, half, (), True, False, False
    )
    state = {"momentum_buffer": on("momentum")}
    matrix = Matrix(Moved(), state, 0, 64, 64, 1.0, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"the {which} of shape \(64, 64\) is on meta, .* cpu"):
        KernelClass(key, [matrix]).prepare()
