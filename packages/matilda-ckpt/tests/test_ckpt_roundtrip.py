"""What goes in comes out: every bit, every type, every tie."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from matilda_ckpt import Checkpointer, DamagedError, NoValidCheckpointError, load_state
from matilda_ckpt.state_tree import Encoder, decode


def same(a: object, b: object) -> bool:
    """Bitwise equality with equal types, through nested structures."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and bytes(a.contiguous().reshape(-1).view(torch.uint8).numpy())
            == bytes(b.contiguous().reshape(-1).view(torch.uint8).numpy())
            if a.numel()
            else a.dtype == b.dtype and a.shape == b.shape
        )
    if isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        assert isinstance(b, np.generic)
        return a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        assert isinstance(b, dict)
        return all(
            same(ka, kb) and same(va, vb)
            for (ka, va), (kb, vb) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, list | tuple):
        assert isinstance(b, list | tuple)
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        assert isinstance(b, float)
        return struct.pack("<d", a) == struct.pack("<d", b) or (math.isnan(a) and math.isnan(b))
    return a == b


def test_every_dtype_zero_sizes_scalars_and_strides_round_trip(tmp_path: Path) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    state = {
        "bf16": bits.view(torch.bfloat16)[:64],
        "fp16": bits.view(torch.float16),
        "fp32": torch.randn(3, 5),
        "fp64": torch.randn(7, dtype=torch.float64),
        "fp8": bits.view(torch.float8_e4m3fn),
        "fp8b": bits.view(torch.float8_e5m2),
        "bool": bits % 2 == 0,
        "complex": torch.randn(4, dtype=torch.complex64).conj(),
        **{
            str(dtype): bits.view(dtype)
            for dtype in (
                torch.int8,
                torch.uint8,
                torch.int16,
                torch.uint16,
                torch.int32,
                torch.uint32,
                torch.int64,
                torch.uint64,
            )
        },
        "zero": torch.zeros(0, 3),
        "zero2": torch.zeros(2, 0, dtype=torch.int8),
        "scalar": torch.tensor(3.5),
        "transposed": torch.randn(4, 6).t(),
        "strided": torch.randn(10, 10)[::2, ::3],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "param": torch.nn.Parameter(torch.randn(2)),
    }
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"x": state})
    loaded = checkpoints.load_state(1)["x"]
    state["param"] = state["param"].detach()
    state["complex"] = state["complex"].resolve_conj()
    assert same(state, loaded)


def test_python_structures_come_back_with_exact_types(tmp_path: Path) -> None:
    state = {
        "none": None,
        "true": True,
        "one": 1,
        "big": -(2**200),
        "float": 1.0,
        "tiny": 5e-324,
        "minus_zero": -0.0,
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "text": 'ü\ud800\0\n"$',
        "tuple": (1, (2.0, [3, ()])),
        "bytes": bytes(range(256)),
        "keys": {0: "int", "0": "str", (1, 2): "tuple", None: 0, True: 1, 2.5: 2},
        "$tensor": {"$dict": 1, "$": 2},
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
        "order": {"z": 1, "a": 2},
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3)[:, ::2],
        "empty": np.zeros((0, 4)),
        "np_scalar": np.float64(1.5),
        "np_bool": np.bool_(True),
        "empties": [{}, [], ()],
    }
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(0, {"extra": state, "bare": 7, "list": [torch.ones(2)]})
    loaded = checkpoints.load_state()
    assert same(state, loaded["extra"])
    assert loaded["bare"] == 7
    assert same(loaded["list"], [torch.ones(2)])


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary(max_size=20)
    | st.builds(lambda n: torch.arange(n, dtype=torch.int32), st.integers(0, 3)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        | st.dictionaries(st.integers() | st.text(max_size=3) | st.floats(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(values)
def test_any_nested_state_survives_the_tree_encoding(value: object) -> None:
    encoded = Encoder().encode("x", value)
    tree = json.loads(json.dumps(encoded.tree, allow_nan=False))
    stored = {
        t.name: torch.frombuffer(bytearray(b"".join(t.read())), dtype=torch.int32)
        if t.nbytes
        else torch.zeros(t.shape, dtype=torch.int32)
        for t in encoded.tensors
    }
    assert same(decode("x", tree, lambda _owner, key: stored[key], lambda *_: None), value)


def test_adamw_and_model_resume_bitwise_through_objects(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, object]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        return model, optimizer, scheduler

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, s: object, n: int) -> None:
        for i in range(n):
            model(torch.full((4, 8), 0.1 * i) + torch.arange(4)[:, None]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            s.step()

    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, 3)
    checkpoints = Checkpointer(tmp_path, shard_bytes=600)
    checkpoints.save(3, {"model": model, "optim": optimizer, "schedule": scheduler})
    assert len(list((tmp_path / "step-00000003").glob("optim-*.safetensors"))) > 1
    other = build()
    checkpoints.restore(dict(zip(("model", "optim", "schedule"), other, strict=True)))
    assert same(other[1].state_dict(), optimizer.state_dict())
    train(model, optimizer, scheduler, 3)
    train(*other, 3)
    assert same(dict(other[0].state_dict()), dict(model.state_dict()))
    assert same(other[1].state_dict(), optimizer.state_dict())


def test_multisteplr_resumes_inside_and_outside_a_sequence(tmp_path: Path) -> None:
    def scheduler() -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        warmup = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 4)
        drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 4])
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, drops], [3])

    def rates(start: int, state: dict[str, object]) -> list[float]:
        optimizer, schedule = state["optimizer"], state["schedule"]
        assert isinstance(optimizer, torch.optim.SGD)
        assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
        seen = []
        for _ in range(start, 9):
            optimizer.step()
            schedule.step()
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    def build() -> dict[str, object]:
        return dict(zip(("optimizer", "schedule"), scheduler(), strict=True))

    expected = rates(0, build())
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(0, build())
    resumed = build()
    checkpoints.restore(resumed)
    assert rates(0, resumed) == expected
    assert expected[-1] == pytest.approx(1e-3)
    state = checkpoints.load_state(0)["schedule"]
    assert isinstance(state, dict)
    assert state["_schedulers"][1]["milestones"] == Counter({2: 2, 4: 1})


def test_wrapped_and_compiled_models_have_no_prefixes(
    tmp_path: Path,
) -> None:
    plain = torch.nn.Linear(3, 2)
    wrapped = {
        "compiled": torch.compile(plain),
        "parallel": torch.nn.DataParallel(plain),
        "both": torch.compile(torch.nn.DataParallel(plain)),
    }
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"plain": plain, **wrapped})
    loaded = checkpoints.load_state(1)
    assert all(list(loaded[name]) == ["weight", "bias"] for name in wrapped)
    other = torch.nn.Linear(3, 2)
    checkpoints.restore({"compiled": other, "plain": torch.compile(torch.nn.Linear(3, 2))})
    assert torch.equal(other.weight, plain.weight)


def test_tied_tensors_are_stored_once_within_and_across_names(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(1000))
    checkpoints = Checkpointer(tmp_path)
    info = checkpoints.save(
        1, {"model": {"embed": weight, "head": weight}, "ema": {"copy": weight, "own": weight + 1}}
    ).result()
    assert info.bytes < 2 * 4000 + 4000
    state = checkpoints.load_state(names=["ema"])
    assert list(state) == ["ema"]
    assert torch.equal(state["ema"]["copy"], weight)
    model = checkpoints.load_state()["model"]
    assert torch.equal(model["embed"], weight)
    assert model["embed"].data_ptr() == model["head"].data_ptr()


def test_files_are_plain_safetensors_with_the_hashes_of_sha256sum(
    tmp_path: Path,
) -> None:
    model = torch.nn.Linear(3, 4)
    checkpoints = Checkpointer(tmp_path)
    path = checkpoints.save(7, {"model": model}).path
    loaded = load_file(path / "model.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    assert sorted(p.name for p in path.iterdir()) == [
        "COMMIT",
        "MANIFEST.json",
        "model.json",
        "model.safetensors",
    ]
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry["size"] == len(data)
        if name.endswith(".json"):
            assert entry["sha256"] == hashlib.sha256(data).hexdigest()
            continue
        start = entry["header_size"]
        parts = [data[:start]]
        for tensor in sorted(entry["tensors"].values(), key=lambda t: t["offsets"]):
            parts.append(data[start + tensor["offsets"][0] : start + tensor["offsets"][1]])
            assert tensor["sha256"] == hashlib.sha256(parts[-1]).hexdigest()
        assert b"".join(parts) == data
        lines = "".join(hashlib.sha256(part).hexdigest() + "\n" for part in parts)
        assert entry["header_sha256"] == lines[:64]
        assert entry["tree_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    tensor = manifest["files"]["model.safetensors"]["tensors"]["weight"]
    raw = model.weight.detach().numpy().tobytes()
    assert tensor["sha256"] == hashlib.sha256(raw).hexdigest()
    commit = json.loads((path / "COMMIT").read_bytes())
    sealed = hashlib.sha256((path / "MANIFEST.json").read_bytes()).hexdigest()
    assert commit["manifest_sha256"] == sealed


def test_manifests_form_a_chain_with_metrics_and_provenance(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, run_id="run-a")
    checkpoints.save(1, {"x": 1}, metrics={"val": math.inf}, provenance={"data_id": "abc"})
    checkpoints.save(2, {"x": 2})
    restored = checkpoints.restore({})
    first = checkpoints.restore({}, step=1)
    assert restored is not None
    assert first is not None
    data = (first.path / "MANIFEST.json").read_bytes()
    assert restored.manifest.parent == hashlib.sha256(data).hexdigest()
    assert first.manifest.parent is None
    assert first.manifest.metrics == {"val": math.inf}
    assert first.manifest.provenance == {"data_id": "abc"}
    assert first.manifest.run_id == "run-a"
    assert restored.state == {"x": 2}


def test_same_step_again_gets_its_own_name_and_is_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    first = checkpoints.save(5, {"x": "first"}).path
    second = checkpoints.save(5, {"x": "second"}).path
    assert [first.name, second.name] == ["step-00000005", "step-00000005.1"]
    assert load_state(first) == {"x": "first"}
    restored = checkpoints.restore({})
    assert restored is not None
    assert restored.state == {"x": "second"}


def test_after_going_back_the_new_branch_is_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(100, {"x": "before"})
    checkpoints.save(200, {"x": "spiked"})
    checkpoints.restore({}, step=100)
    checkpoints.save(150, {"x": "branch"})
    restored = checkpoints.restore({})
    assert restored is not None
    assert (restored.step, restored.state) == (150, {"x": "branch"})


def test_none_only_when_there_is_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "missing").restore({"x": None}) is None
    assert not (tmp_path / "missing").exists()
    (tmp_path / "empty").mkdir()
    assert Checkpointer(tmp_path / "empty").restore({}) is None


def test_one_checkpoint_is_no_directory_of_them_and_stays_intact(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        path = checkpoints.save(1, {"x": torch.ones(2)}).path
    for read_only in (True, False):
        with pytest.raises(ValueError, match="is one checkpoint"):
            Checkpointer(path, read_only=read_only).restore({"x": None})
    with pytest.raises(ValueError, match="is one checkpoint"):
        Checkpointer(path).save(2, {"x": torch.ones(2)})
    with pytest.raises(ValueError, match="is one checkpoint"):
        Checkpointer(path, read_only=True).list()
    restored = Checkpointer(tmp_path).restore({"x": None})
    assert restored is not None
    assert restored.step == 1
    with pytest.raises(DamagedError, match="directory of checkpoints; give one of them"):
        load_state(tmp_path)


def test_non_finite_state_is_stored_but_never_resumed_from(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"m": {"w": torch.ones(4)}})
    bad = torch.ones(4)
    bad[2] = math.nan
    info = checkpoints.save(2, {"m": {"w": bad}}).result()
    assert not info.healthy
    checkpoints.save(3, {"m": {"w": torch.ones(4)}}, healthy=False)
    restored = checkpoints.restore({})
    assert restored is not None
    assert restored.step == 1
    assert [skip.step for skip in restored.skipped] == [3, 2]
    assert checkpoints.restore({}, step=3) is not None
    only = Checkpointer(tmp_path / "only")
    only.save(1, {"w": torch.tensor(math.inf)})
    with pytest.raises(NoValidCheckpointError, match="not healthy"):
        only.restore({})


def test_checkpoints_that_the_caller_does_not_accept_are_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, {"m": {"w": torch.ones(4)}})
    restored = checkpoints.restore({}, accept=lambda info: info.step < 3)
    assert restored is not None
    assert restored.step == 2
    assert [skip.step for skip in restored.skipped] == [3]
    assert [info.step for info in checkpoints.list()] == [3, 2, 1]
    with pytest.raises(NoValidCheckpointError, match="did not accept"):
        checkpoints.restore({}, accept=lambda info: False)


def test_huge_but_finite_values_are_healthy(tmp_path: Path) -> None:
    big = torch.full((8,), torch.finfo(torch.float32).max)
    info = Checkpointer(tmp_path).save(1, {"w": big, "f8": {"a": big.to(torch.float64) * 0}})
    assert info.result().healthy


def test_restore_touches_no_object_unless_everything_fits(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, {"model": torch.nn.Linear(2, 2)})
    model = torch.nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(ValueError, match="holds no 'ema'; it holds model"):
        checkpoints.restore({"model": model, "ema": None})
    with pytest.raises(ValueError, match="no load_state_dict"):
        checkpoints.restore({"model": {"weight": 1}})
    with pytest.raises(ValueError, match="no checkpoint of step 9; it has: 1"):
        checkpoints.restore({"model": model}, step=9)
    assert torch.equal(model.weight, before)


def test_core_and_torch_free_state_work_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys
import matilda_ckpt
c = matilda_ckpt.Checkpointer({str(tmp_path)!r})
c.save(1, {{"a": {{"b": [1, 2.5, (3,)]}}}})
assert c.restore({{}}).state == {{"a": {{"b": [1, 2.5, (3,)]}}}}
assert matilda_ckpt.verify(c.list()[0].path).ok
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load_state_by_path_step_and_names(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    path = checkpoints.save(1, {"model": torch.nn.Linear(2, 2), "x": 1}).path
    checkpoints.save(2, {"x": 2})
    reader = Checkpointer(tmp_path, read_only=True)
    assert reader.load_state(1, names=["x"]) == {"x": 1}
    assert reader.load_state() == {"x": 2}
    assert set(load_state(path)) == {"model", "x"}
    with pytest.raises(ValueError, match="no 'y'"):
        load_state(path, names=["y"])
    with pytest.raises(DamagedError):
        load_state(tmp_path / "step-00000099")
    with pytest.raises(ValueError, match="read_only"):
        reader.save(3, {"x": 3})
