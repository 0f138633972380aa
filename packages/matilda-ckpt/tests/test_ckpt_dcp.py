"""torch.distributed.checkpoint over our storage: drop-in, verified, resharded bit for bit."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from matilda_ckpt import Checkpointer, Keep, SaveError, verify
from matilda_ckpt.comparison import compare
from matilda_ckpt.dcp import DcpReader, DcpWriter
from matilda_ckpt.export import export
from matilda_ckpt.fs import OsFs, WriteFile

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FULL = os.environ.get("MATILDA_SLOW") == "1"


def state(step: int) -> dict[str, object]:
    return {
        "model": {"w": torch.full((4, 3), float(step)), "b": torch.arange(step, step + 5)},
        "loop": {"step": step, "text": "ä", "nested": {"lr": 0.1, "none": None}},
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(step),
    }


def test_round_trip_without_pickle_and_through_retention(tmp_path: Path) -> None:
    for step in range(1, 5):
        writer = DcpWriter(tmp_path, step=step, keep=Keep(last=2), metrics={"val": 1.0})
        dcp.save(state(step), storage_writer=writer, no_dist=True)
    found = Checkpointer(tmp_path, read_only=True).list()
    assert [info.step for info in found] == [4, 3]
    assert found[0].healthy
    assert all(verify(info.path).ok for info in found)
    assert {p.name for p in Path(found[0].path).iterdir()} == {
        "COMMIT",
        "MANIFEST.json",
        "dcp.json",
        "dcp.r00000-of-00001.safetensors",
    }
    target = state(0)
    dcp.load(target, storage_reader=DcpReader(tmp_path), no_dist=True)
    expected = state(4)
    assert torch.equal(target["model"]["w"], expected["model"]["w"])
    assert torch.equal(target["model"]["b"], expected["model"]["b"])
    assert target["loop"] == expected["loop"]
    assert int(target["scalar"]) == 4


def test_damage_and_foreign_writers_are_refused(tmp_path: Path) -> None:
    dcp.save(state(1), storage_writer=DcpWriter(tmp_path, step=1), no_dist=True)
    path = tmp_path / "step-00000001" / "dcp.r00000-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointException, match="damaged tensor"):
        dcp.load(state(0), storage_reader=DcpReader(tmp_path), no_dist=True)
    with Checkpointer(tmp_path) as other:
        other.save(5, {"x": 1})
        with pytest.raises(CheckpointException, match="another process"):
            dcp.save(state(2), storage_writer=DcpWriter(tmp_path, step=2), no_dist=True)


class LimitedFs(OsFs):
    """Each file is as long as the process may make it, and the next byte is one too many."""

    def create(self, path: str, size: int) -> WriteFile:
        return super().create(path, 0)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_save_that_fails_while_writing_leaves_no_lock_and_no_bytes(tmp_path: Path) -> None:
    big = {"w": torch.ones(100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    failed = DcpWriter(tmp_path, step=1, fs=LimitedFs())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointException, match="File too large"):
            dcp.save(big, storage_writer=failed, no_dist=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["LOCK"]
    dcp.save(big, storage_writer=DcpWriter(tmp_path, step=2), no_dist=True)
    assert names(tmp_path) == ["LOCK", "step-00000002"]
    dcp.save(big, storage_writer=failed, no_dist=True)
    assert names(tmp_path) == ["LOCK", "step-00000001", "step-00000002"]


def test_next_save_of_the_same_writer_ends_one_that_another_rank_left(tmp_path: Path) -> None:
    writer = DcpWriter(tmp_path, step=1)
    writer.set_up_storage_writer(True)
    plans = writer.prepare_global_plan([SavePlan([]), SavePlan([])])
    assert Path(plans[0].storage_data["temp"]).is_dir()
    writer.reset()
    assert names(tmp_path) == ["LOCK"]
    writer.set_up_storage_writer(True)
    writer.prepare_global_plan([SavePlan([])])
    dcp.save(state(1), storage_writer=writer, no_dist=True)
    assert names(tmp_path) == ["LOCK", "step-00000001"]


def test_results_of_another_save_are_not_sealed(tmp_path: Path) -> None:
    writer = DcpWriter(tmp_path, step=1)
    writer.set_up_storage_writer(True)
    planner = DefaultSavePlanner()
    planner.set_up_planner(state(1), is_coordinator=True)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    first = writer.prepare_global_plan(plans)[0]
    results = writer.write_data(first, planner).value()
    writer.set_up_storage_writer(True)
    writer.write_data(writer.prepare_global_plan(plans)[0], planner)
    with pytest.raises(SaveError, match="use one `DcpWriter` for each save"):
        writer.finish(metadata, [results])
    assert names(tmp_path) == ["LOCK"]


def test_old_checkpoints_that_cannot_be_removed_do_not_undo_the_new_one(tmp_path: Path) -> None:
    class Stuck(OsFs):
        def rename_noreplace(self, src: str, dst: str) -> None:
            if ".trash-" in dst:
                raise OSError(errno.EIO, "stuck")
            super().rename_noreplace(src, dst)

    for step in (1, 2, 3):
        writer = DcpWriter(tmp_path, step=step, keep=Keep(last=2), fs=Stuck())
        dcp.save(state(step), storage_writer=writer, no_dist=True)
    assert names(tmp_path) == ["LOCK", "step-00000001", "step-00000002", "step-00000003"]


OTHER_RANK = """
import os, resource, sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from matilda_ckpt.dcp import DcpWriter

root = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
state = {f"w{rank}": torch.ones(100_000)}
failed = DcpWriter(root, step=1)
if rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    dcp.save(state, storage_writer=failed)
    raise AssertionError("it was acknowledged")
except CheckpointException as error:
    assert "File too large" in str(error), error
    failed.abandon()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
dist.barrier()
if rank == 0:
    assert os.listdir(root) == ["LOCK"], os.listdir(root)
dcp.save(state, storage_writer=DcpWriter(root, step=2))
dist.barrier()
dist.destroy_process_group()
"""


def torchrun(program: str, size: int, root: Path, *arguments: str) -> str:
    """What `size` ranks of a program print that is given `root/c`; they must all end well."""
    script = root / "program.py"
    script.write_text(program)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={size}", str(script), str(root / "c"), *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
    )
    assert done.returncode == 0, done.stderr[:5000] + done.stderr[-3000:]
    return done.stdout


def test_save_that_another_rank_failed_can_be_abandoned(tmp_path: Path) -> None:
    torchrun(OTHER_RANK, 2, tmp_path)
    assert [info.step for info in Checkpointer(tmp_path / "c", read_only=True).list()] == [2]


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from matilda_ckpt.dcp import DcpWriter

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for step in (1, 2, 3):
    full = torch.arange(12.0).reshape(6, 2)
    full[:3] += float(step == 3)  # the first rank's half alone
    shard = distribute_tensor(full, mesh, [Shard(0)])
    dcp.save({"w": shard}, storage_writer=DcpWriter(sys.argv[1], step=step))
dist.barrier()
dist.destroy_process_group()
"""


def test_diff_of_sharded_checkpoints_sees_every_rank(tmp_path: Path) -> None:
    torchrun(TWO_RANKS, 2, tmp_path)
    one, two, three = (tmp_path / f"c/step-0000000{step}" for step in (1, 2, 3))
    same = compare(one, two)
    assert (same.equal_tensors, same.same) == (2, True)
    different = compare(one, three)
    assert different.equal_tensors == 1
    assert [(change.name, change.differing) for change in different.tensors] == [
        ("dcp/w@0 in dcp.r00000-of-00002.safetensors", 6)
    ]


def test_whoever_reads_a_sharded_checkpoint_in_another_way_is_told_how(tmp_path: Path) -> None:
    dcp.save(state(1), storage_writer=DcpWriter(tmp_path, step=1), no_dist=True)
    how = "load it with `DcpReader`"
    with pytest.raises(ValueError, match=how):
        Checkpointer(tmp_path, read_only=True).restore({"model": None})
    path = tmp_path / "step-00000001"
    for name in ("model", "dcp"):
        with pytest.raises(ValueError, match=how):
            export(path, tmp_path / "out.safetensors", name=name)


def test_an_array_in_sharded_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match=r"'x' holds an array.* make it a torch tensor"):
        dcp.save({"x": np.arange(3)}, storage_writer=DcpWriter(tmp_path, step=1), no_dist=True)


def test_object_storage_is_refused_instead_of_becoming_a_local_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="need a shared directory; object storage is not supp"):
        DcpWriter("s3://bucket/run", step=1)
    with pytest.raises(ValueError, match="`s3://bucket/run` asks"):
        DcpReader(Path("s3://bucket/run"))
    assert list(tmp_path.iterdir()) == []


def test_step_and_run_id_are_checked_before_the_save_begins(tmp_path: Path) -> None:
    for step in (-1, 10**18, 1.5):
        with pytest.raises(ValueError, match="`step` must be an integer"):
            DcpWriter(tmp_path, step=step)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`keep` must be a `Keep`, not 3"):
        DcpWriter(tmp_path, step=1, keep=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`run_id` must be a string of at most 256"):
        DcpWriter(tmp_path, step=1, run_id="r" * 257)


def test_non_finite_shard_makes_the_checkpoint_unhealthy(tmp_path: Path) -> None:
    writer = DcpWriter(tmp_path, step=1)
    dcp.save({"w": torch.tensor([1.0, float("nan")])}, storage_writer=writer, no_dist=True)
    assert writer.info is not None
    assert not writer.info.healthy


RESHARD = """
import hashlib, os, sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from matilda_ckpt.dcp import DcpReader, DcpWriter

root, mode, load, save = sys.argv[1:5]
torch.set_num_threads(1)
dist.init_process_group("gloo")
world = dist.get_world_size()
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(13, 29), torch.nn.GELU(), torch.nn.Linear(29, 7, bias=False))
if mode == "fsdp":
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
elif mode == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)

def train(seed):
    torch.manual_seed(seed)
    model(torch.randn(8, 13)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

train(1)
if load != "-":
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    m, o = get_state_dict(model, optimizer)
    state = {"model": m, "optim": o}
    dcp.load(state, storage_reader=DcpReader(root, step=int(load)))
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optim"])
if save != "-":
    m, o = get_state_dict(model, optimizer)
    dcp.save({"model": m, "optim": o}, storage_writer=DcpWriter(root, step=int(save)))
options = StateDictOptions(full_state_dict=True)
m, o = get_state_dict(model, optimizer, options=options)
h = hashlib.sha256()
def visit(v):
    if isinstance(v, torch.Tensor):
        v = v.full_tensor() if hasattr(v, "full_tensor") else v
        h.update(v.detach().contiguous().numpy().tobytes())
    elif isinstance(v, dict):
        for k in sorted(v, key=str):
            h.update(str(k).encode()); visit(v[k])
    elif isinstance(v, (list, tuple)):
        for x in v: visit(x)
    else:
        h.update(repr(v).encode())
visit(m); visit(o)
if dist.get_rank() == 0:
    print(h.hexdigest(), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def world(size: int, root: Path, mode: str, load: str, save: str) -> str:
    return torchrun(RESHARD, size, root, mode, load, save).split()[-1]


@pytest.mark.skipif(not FULL, reason="starts 4 processes at a time; run with MATILDA_SLOW=1")
def test_fsdp2_4_to_2_to_1_to_ddp_and_back_is_bitwise(tmp_path: Path) -> None:
    first = world(4, tmp_path, "fsdp", "-", "1")
    chain = [(2, "fsdp"), (1, "fsdp"), (2, "ddp"), (1, "plain"), (4, "fsdp"), (3, "fsdp")]
    for number, (size, mode) in enumerate(chain, start=1):
        assert world(size, tmp_path, mode, str(number), str(number + 1)) == first, (size, mode)
    assert all(verify(i.path).ok for i in Checkpointer(tmp_path / "c", read_only=True).list())
