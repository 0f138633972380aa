"""Copies left to the saving thread: safe once waited for, refused when training did not wait."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matilda_ckpt import Checkpointer, Keep, SaveError
from matilda_ckpt.deferred import AT_ONCE_BYTES
from matilda_ckpt.snapshot import BLOCK_BYTES
from matilda_ckpt.torture.model import HeldBackground

FULL = os.environ.get("MATILDA_SLOW") == "1"
LARGE = AT_ONCE_BYTES  # elements of four bytes: not small


def held(folder: Path) -> tuple[Checkpointer, HeldBackground]:
    """A checkpointer whose saving thread begins to copy when the test opens the gate."""
    checkpoints = Checkpointer(folder, keep=Keep(last=100))
    background = checkpoints._background = HeldBackground()
    return checkpoints, background


def test_call_returns_before_the_copy_and_waiting_makes_changes_safe(tmp_path: Path) -> None:
    checkpoints, background = held(tmp_path)
    weight = torch.arange(LARGE, dtype=torch.float32)
    nan = torch.full((LARGE,), float("nan"))
    state = {"w": weight, "tied": weight, "part": weight[5:], "nan": nan}
    handle = checkpoints.save(1, {"x": state}, wait=False, defer_copy=True)
    waiter = threading.Thread(target=handle.wait_copied)
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive(), "returned before anything was copied"
    background.gate.set()
    waiter.join()
    weight.zero_()
    nan.zero_()
    assert not handle.result().healthy
    loaded = checkpoints.load_state(1)["x"]
    assert torch.equal(loaded["w"], torch.arange(LARGE, dtype=torch.float32))
    assert torch.equal(loaded["part"], loaded["w"][5:])
    assert loaded["nan"].isnan().all()


def test_what_is_small_or_no_plain_tensor_is_taken_at_the_call(tmp_path: Path) -> None:
    checkpoints, background = held(tmp_path)
    with torch.inference_mode():
        inference = torch.ones(LARGE)
    tensors = {
        "rate": torch.tensor(1.0),
        "step": torch.ones(3),
        "strided": torch.ones(64, 64)[:, ::2],
        "complex": torch.ones(LARGE, dtype=torch.complex64),
        "inference": inference,
    }
    array = torch.ones(LARGE).numpy()
    state = {"tensors": tensors, "array": array, "rng": torch.get_rng_state(), "n": {"n": 1}}
    handle = checkpoints.save(1, state, wait=False, defer_copy=True)
    with torch.inference_mode():
        for tensor in tensors.values():
            tensor.zero_()
    array[:] = 0
    state["n"]["n"] = 0
    background.gate.set()
    assert handle.result().healthy
    loaded = checkpoints.load_state(1)
    assert all(bool((tensor == 1).all()) for tensor in loaded["tensors"].values())
    assert (loaded["array"] == 1).all()
    assert loaded["n"] == {"n": 1}


Change = Callable[[torch.nn.Parameter], None]


def by_optimizer(make: Callable[..., torch.optim.Optimizer], **options: object) -> Change:
    """One step of an optimizer of torch."""

    def change(weight: torch.nn.Parameter) -> None:
        weight.grad = torch.randn_like(weight)
        make([weight], lr=1e-3, **options).step()

    return change


def by_view(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight.view(2, -1)[1, :3].add_(1)


def by_copy(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight.copy_(torch.zeros_like(weight))


CHANGES: dict[str, Change] = {
    "AdamW, foreach": by_optimizer(torch.optim.AdamW, foreach=True),
    "AdamW, one by one": by_optimizer(torch.optim.AdamW, foreach=False),
    "AdamW, fused": by_optimizer(torch.optim.AdamW, fused=True),
    "SGD, fused": by_optimizer(torch.optim.SGD, fused=True),
    "part of a view": by_view,
    "copy_": by_copy,
    ".data": lambda weight: weight.data.mul_(2),
    "numpy": lambda weight: weight.detach().numpy().fill(2),
}


@pytest.mark.parametrize("when", ["before the copy", "after it", "noticed by the save itself"])
@pytest.mark.parametrize("how", CHANGES)
def test_a_change_before_the_wait_fails_the_save(tmp_path: Path, how: str, when: str) -> None:
    checkpoints, background = held(tmp_path)
    weight = torch.nn.Parameter(torch.randn(LARGE))
    background.gate.set()
    checkpoints.save(1, {"model": {"weight": weight}})
    if when != "after it":
        background.gate.clear()
    else:
        # The bytes are copied already; the writer then waits for the gate.
        background.alive = _second_call_waits(background)  # type: ignore[method-assign]
    handle = checkpoints.save(2, {"model": {"weight": weight}}, wait=False, defer_copy=True)
    if when == "after it":
        handle._copied.wait()
        background.gate.clear()
    CHANGES[how](weight)
    background.gate.set()
    if when != "noticed by the save itself":
        checkpoints.wait_copied()  # too late
    with pytest.raises(SaveError, match=r"step 2 .*`model.weight` was changed.*wait_copied\(\)"):
        checkpoints.finish()
    assert [info.step for info in checkpoints.list()] == [1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    checkpoints.save(3, {"model": {"weight": weight}}, wait=False, defer_copy=True)
    checkpoints.close()
    assert torch.equal(checkpoints.load_state(3)["model"]["weight"], weight)


def _second_call_waits(background: HeldBackground) -> Callable[[], None]:
    calls = []

    def alive() -> None:
        calls.append(None)
        if len(calls) > 1:
            background.gate.wait()

    background.gate.clear()
    return alive


def test_error_of_the_copy_lets_training_go_on_and_is_raised_once(tmp_path: Path) -> None:
    checkpoints, background = held(tmp_path)
    weight = torch.ones(LARGE)
    handle = checkpoints.save(1, {"w": weight}, wait=False, defer_copy=True)
    assert checkpoints._pool is not None
    # torch refuses to write to memory that many elements share.
    checkpoints._pool._blocks[False][:] = [torch.zeros(1, dtype=torch.uint8).expand(BLOCK_BYTES)]
    background.gate.set()
    handle.wait_copied()
    weight.zero_()
    with pytest.raises(SaveError, match=r"step 1 was not saved.*brought to the host"):
        checkpoints.finish()
    checkpoints.wait_copied()
    checkpoints._pool = None
    checkpoints.save(2, {"w": weight}, wait=False, defer_copy=True)
    checkpoints.close()
    assert [info.step for info in checkpoints.list()] == [2]


def test_deadline_while_copying_abandons_the_save_and_lets_go(tmp_path: Path) -> None:
    checkpoints, background = held(tmp_path)
    weight = torch.ones(LARGE)
    handle = checkpoints.save(1, {"w": weight}, wait=False, defer_copy=True)
    with pytest.raises(SaveError, match="abandoned"):
        checkpoints.finish(deadline_s=0.01)
    assert not handle._copied.is_set(), "the thread may still read the tensor"
    background.gate.set()
    checkpoints.wait_copied()
    weight.zero_()
    handle._ended.wait()
    assert checkpoints.list() == []
    checkpoints.save(2, {"w": weight}, wait=False, defer_copy=True).result()
    assert [info.step for info in checkpoints.list()] == [2]


def test_next_save_waits_for_the_copy_of_the_one_before(tmp_path: Path) -> None:
    checkpoints, background = held(tmp_path)
    weight = torch.zeros(LARGE)
    first = checkpoints.save(0, {"w": weight}, wait=False, defer_copy=True)
    threading.Timer(0.1, background.gate.set).start()
    checkpoints.save(1, {"w": weight}, wait=False, defer_copy=True)
    assert first.done
    checkpoints.close()
    assert [info.step for info in checkpoints.list()] == [1, 0]


def test_nothing_to_wait_for_returns_at_once_and_tensors_are_let_go(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path / "c")
    checkpoints.wait_copied()
    Checkpointer(tmp_path / "c", read_only=True).wait_copied()
    checkpoints.save(1, {"w": torch.ones(LARGE)}, defer_copy=True).wait_copied()
    checkpoints.save(2, {"w": torch.ones(LARGE)}, wait=False).wait_copied()
    weight = torch.ones(LARGE)
    storage = weakref.ref(weight.untyped_storage())
    handle = checkpoints.save(3, {"w": weight}, wait=False, defer_copy=True)
    handle.wait_copied()
    handle.result()
    del weight
    assert storage() is None
    checkpoints.close()


OPERATIONS = st.lists(
    st.sampled_from(["save", "save", "wait", "change", "change", "poll", "finish"]), max_size=14
)


@settings(max_examples=300 if FULL else 30, deadline=None)
@given(OPERATIONS, st.booleans())
def test_whatever_the_order_no_torn_state_becomes_a_checkpoint(
    operations: list[str], slow: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, background = held(Path(folder))
        background.gate.set()
        weight = torch.zeros(LARGE, dtype=torch.int64)
        expected: dict[int, int] = {}
        careless = False  # the save in flight met a change before `wait_copied`
        waited = True

        def settle(call: Callable[[], object]) -> None:
            """An error may come only where training did not wait."""
            nonlocal careless, waited
            background.gate.set()
            try:
                call()
            except SaveError:
                assert careless
            if checkpoints._background._current is None:
                careless, waited = False, True

        for operation in operations:
            if operation == "save":
                settle(checkpoints.finish)
                if slow:
                    background.gate.clear()
                step = len(expected)
                expected[step] = int(weight[0])
                checkpoints.save(step, {"w": weight}, wait=False, defer_copy=True)
                waited = False
            elif operation == "change":
                weight.add_(1)
                careless = careless or not waited
            elif operation == "wait":
                background.gate.set()
                checkpoints.wait_copied()
                waited = True
            elif operation == "poll":
                settle(checkpoints.poll)
            else:
                settle(checkpoints.finish)
        settle(checkpoints.finish)
        durable = {info.step for info in checkpoints.list()}
        for step in durable:
            assert checkpoints.load_state(step)["w"].unique().tolist() == [expected[step]]
        if "change" not in operations:
            assert durable == expected.keys()
        checkpoints.close()
