"""Sharded checkpoints: torch.distributed.checkpoint's planners over our commit protocol.

    dcp.save(state, storage_writer=DcpWriter("checkpoints", step=1000))
    dcp.load(state, storage_reader=DcpReader("checkpoints"))

The planners deduplicate, shard and reshard; this file stores. Each rank writes one safetensors
file, rank 0 seals and publishes. Unlike `FileSystemWriter`: no pickle on disk, every chunk has a
SHA-256 that is checked when it is read, an error on any rank fails the save on all of them, and a
checkpoint is either complete and durable or not there.
"""

from __future__ import annotations

import io
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from matilda_ckpt import strict_json, torch_tensors
from matilda_ckpt.catalog import Catalog, CheckpointInfo
from matilda_ckpt.errors import DamagedError, NoValidCheckpointError, SaveError
from matilda_ckpt.finite import FiniteWatch
from matilda_ckpt.fs import Fs, OsFs
from matilda_ckpt.manifest import FileEntry, Manifest, StateEntry, TensorEntry, check_run_id
from matilda_ckpt.object_fs import object_url
from matilda_ckpt.reading import SHARDED_NAME
from matilda_ckpt.retention import Keep, check_keep
from matilda_ckpt.save_request import check_step
from matilda_ckpt.state_tree import Encoder, decode
from matilda_ckpt.store import Draft, SaveRequest, Store
from matilda_ckpt.strict_json import JSON
from matilda_ckpt.tensor_file import TensorSource, plan_tensor_file, write_tensor_file

__all__ = ["DcpReader", "DcpWriter"]

_LOG = logging.getLogger("matilda_ckpt")
NAME = SHARDED_NAME
"""The state name under which sharded state is kept; its JSON file holds the layout."""


@dataclass(frozen=True)
class _Stored:
    """What one rank reports about one item; travels to rank 0 in DCP's own messages."""

    key: str = ""
    file: str = ""
    value: JSON = None
    entries: Mapping[str, FileEntry] = field(default_factory=dict)
    finite: bool = True
    temp: str = ""
    """Of the save for which it was written."""


class DcpWriter(StorageWriter):
    """`storage_writer` of `dcp.save` and `dcp.async_save`; use one object for each save.

    Args:
        root: directory of the checkpoints, on storage that all ranks share.
        step: step of this checkpoint.
        keep: retention rule applied after the save is durable; None deletes nothing.
        metrics, provenance, healthy, run_id: as in `Checkpointer.save`.

    Raises what DCP makes of a SaveError on any rank (`CheckpointException`), on every rank. DCP
    does not tell a writer that another rank has failed; until this process ends or calls `abandon`,
    the lock is held and what the ranks have written stays:

        try:
            dcp.save(state, storage_writer=writer)
        except CheckpointException:
            writer.abandon()
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        step: int,
        keep: Keep | None = None,
        metrics: Mapping[str, float] | None = None,
        provenance: Mapping[str, JSON] | None = None,
        healthy: bool = True,
        run_id: str | None = None,
        fs: Fs | None = None,
    ) -> None:
        super().__init__()
        self._fs = fs or OsFs()
        self._root = _shared_directory(root)
        self._step = check_step(step)
        if keep is not None:
            check_keep(keep)
        self._keep = keep
        self._metrics = dict(metrics or {})
        self._provenance = dict(provenance or {})
        self._healthy = healthy
        self._run_id = check_run_id(run_id or secrets.token_hex(8))
        self._store: Store | None = None
        self._draft: Draft | None = None
        self.info: CheckpointInfo | None = None
        """The durable checkpoint, on the coordinating rank, once the save has returned."""

    def abandon(self) -> None:
        """After a save that failed: remove what it wrote and release the lock. Harmless otherwise,
        and on ranks that do not coordinate; never call it while a save is under way."""
        store, draft = self._store, self._draft
        self._store = self._draft = None
        if store is None:
            return
        if draft is not None:
            store.discard(draft)
        store.release()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.abandon()
        self.info = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        # DCP calls `reset` only when it was given a `checkpoint_id`.
        self.reset()
        if is_coordinator:
            self._store = Store(self._fs, self._root, run_id=self._run_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: lock, make the temporary directory, tell every rank its file."""
        assert self._store is not None
        with self._store.reporting(self._step):
            self._draft = self._store.begin(self._step)
        world = len(plans)
        return [
            replace(
                plan,
                storage_data={
                    "temp": self._draft.temp,
                    "file": f"{NAME}.r{rank:05d}-of-{world:05d}.safetensors",
                },
            )
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write, hash and fsync this rank's file."""
        temp, file = plan.storage_data["temp"], plan.storage_data["file"]
        try:
            results = self._write_items(plan, planner, temp, file)
        except BaseException:
            if self._draft is not None and self._draft.temp == temp:
                self.abandon()
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_items(
        self, plan: SavePlan, planner: SavePlanner, temp: str, file: str
    ) -> list[WriteResult]:
        watch = FiniteWatch()
        sources: list[TensorSource] = []
        results: list[WriteResult] = []
        for number, item in enumerate(plan.items):
            if item.type == WriteItemType.BYTE_IO:
                value = _plain_value(planner, item.index)
                results.append(WriteResult(item.index, 0, _Stored(value=value, temp=temp)))
                continue
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor)
            found = torch_tensors.source(item.index.fqn, tensor.detach())
            key = f"{item.index.fqn}@{number}"
            read = watch.over(found.dtype, found.read)
            sources.append(TensorSource(key, found.dtype, found.shape, read))
            nbytes = tensor.numel() * tensor.itemsize
            results.append(WriteResult(item.index, nbytes, _Stored(key, file, temp=temp)))
        if sources:
            entry = self._write(f"{temp}/{file}", sources)
            first = results[0]
            stored = replace(first.storage_data, entries={file: entry}, finite=watch.finite)
            results[0] = WriteResult(first.index, first.size_in_bytes, stored)
        return results

    def _write(self, path: str, sources: list[TensorSource]) -> FileEntry:
        plan = plan_tensor_file(sources)
        try:
            handle = self._fs.create(path, plan.size)
            try:
                return write_tensor_file(handle, plan)
            finally:
                handle.close()
        except OSError as error:
            raise SaveError(
                f"the checkpoint of step {self._step} was not saved: `{path}`: {error}; "
                "earlier checkpoints are untouched"
            ) from error

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: check every rank's file as seen from here, seal, publish."""
        store, draft = self._store, self._draft
        assert store is not None
        assert draft is not None
        self._draft = None  # `discarding` sees to it, and it may become a checkpoint
        flat = [result for rank in results for result in rank]
        files = {f: e for result in flat for f, e in result.storage_data.entries.items()}
        finite = all(result.storage_data.finite for result in flat)
        request = SaveRequest(
            self._step, (), self._healthy, lambda: finite, self._metrics, self._provenance
        )
        try:
            with store.reporting(self._step), store.discarding(draft):
                _check_same_save(draft.temp, flat)
                _check_visible(self._fs, draft.temp, files)
                layout = strict_json.dumps(_layout(metadata, flat), sort_keys=False)
                files[f"{NAME}.json"] = store.write_text(draft, f"{NAME}.json", layout)
                tensors = tuple(sorted(f for f in files if not f.endswith(".json")))
                state = {NAME: StateEntry(f"{NAME}.json", tensors)}
                self.info = store.finish(draft, request, files, state)
            self._retire(store)
        finally:
            self.abandon()

    def _retire(self, store: Store) -> None:
        try:
            if self._keep is not None:
                store.retire(self._keep)
        except OSError as error:
            _LOG.warning("old checkpoints in `%s` could not be removed: %s", self._root, error)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).parent.exists()


class DcpReader(StorageReader):
    """`storage_reader` of `dcp.load`: every chunk is verified before it is handed out.

    Args:
        path: one checkpoint, or a directory of them (its newest healthy one is read).
        step: of a directory, this step.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, step: int | None = None, fs: Fs | None = None
    ) -> None:
        super().__init__()
        self._fs = fs or OsFs()
        self._path = _shared_directory(path)
        self._step = step
        self._catalog: Catalog | None = None
        self._name = ""
        self._manifest: Manifest | None = None
        self._layout: Any = {}

    @property
    def checkpoint_path(self) -> Path:
        """The directory that is read, once `dcp.load` has begun."""
        assert self._catalog is not None
        return Path(self._catalog.root) / self._name

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._manifest = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._open()
        assert self._manifest is not None
        assert self._catalog is not None
        data = self._catalog.read_json(self._name, self._manifest, f"{NAME}.json")
        try:
            return self._metadata(data)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"`{self.checkpoint_path}/{NAME}.json`: {error!r}") from error

    def _open(self) -> None:
        if self._fs.entry(f"{self._path}/COMMIT") is not None:
            root, self._name = os.path.split(self._path)
            self._catalog = Catalog(self._fs, root)
        else:
            self._catalog = Catalog(self._fs, self._path)
            usable = [
                info
                for info in self._catalog.scan()
                if info.problem is None
                and (info.healthy if self._step is None else info.step == self._step)
            ]
            if not usable:
                raise NoValidCheckpointError(f"`{self._path}` holds no such healthy checkpoint")
            self._name = usable[0].name
        self._manifest, _ = self._catalog.open(self._name)
        if NAME not in self._manifest.state:
            raise ValueError(
                f"`{self.checkpoint_path}` was not saved by DCP; read it with `Checkpointer`"
            )

    def _metadata(self, data: bytes) -> Metadata:
        layout: Any = strict_json.loads(data, f"{NAME}.json")
        self._layout = layout
        entries: dict[str, Any] = {}
        for fqn, item in self._layout["tensors"].items():
            dtype = torch_tensors.TORCH_DTYPES[item["dtype"]]
            chunks = [
                ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"]))
                for c in item["chunks"]
            ]
            size = torch.Size(item["size"])
            entries[fqn] = TensorStorageMetadata(TensorProperties(dtype), size, chunks)
        for fqn in self._layout["values"]:
            entries[fqn] = BytesStorageMetadata()
        return Metadata(entries, planner_data=_decoded(self._layout["planner"]), storage_data={})

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        return

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors; each stored chunk is read and verified once."""
        wanted: dict[tuple[str, str], list[Any]] = {}
        for item in plan.items:
            fqn = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                # The default planner calls torch.load on this: bytes that we made just now from
                # plain data, never bytes from disk.
                buffer = io.BytesIO()
                torch.save(_decoded(self._layout["values"][fqn]), buffer)
                buffer.seek(0)
                planner.load_bytes(item, buffer)
                continue
            offsets = list(item.storage_index.offset or ())
            for chunk in self._layout["tensors"][fqn]["chunks"]:
                if not offsets or chunk["offsets"] == offsets:
                    wanted.setdefault((chunk["file"], chunk["key"]), []).append(item)
                    break
        for (file, key), items in sorted(wanted.items(), key=lambda kv: kv[0]):
            stored = self._chunk(file, key)
            for item in items:
                part = stored
                for dim, (start, length) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    part = part.narrow(dim, start, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _chunk(self, file: str, key: str) -> torch.Tensor:
        assert self._catalog is not None
        assert self._manifest is not None
        entry = self._manifest.files.get(file)
        if entry is None or key not in entry.tensors:
            raise DamagedError(f"`{self.checkpoint_path}` has no chunk {key!r} in `{file}`")
        stored: TensorEntry = entry.tensors[key]
        tensor, view = torch_tensors.empty(stored.dtype, stored.shape)
        self._catalog.read_one_tensor(self._name, self._manifest, file, key, view)
        return tensor

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).exists()


def _shared_directory(path: str | os.PathLike[str]) -> str:
    """The absolute path; ValueError for a URL, which would silently name a directory here."""
    url = object_url(path)
    if url is not None:
        raise ValueError(
            "sharded checkpoints need a shared directory; object storage is not supported here, "
            f"as `{url}` asks: use `Checkpointer`, or give a directory that all ranks share"
        )
    return os.path.abspath(path)  # noqa: PTH100


def _plain_value(planner: SavePlanner, index: MetadataIndex) -> JSON:
    """JSON of a value that is not a tensor; ValueError when it would need pickle."""
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise ValueError(
            "this planner only offers pickled values; derive it from DefaultSavePlanner"
        )
    encoded = Encoder().encode(index.fqn, lookup(index))
    if encoded.tensors:
        raise ValueError(
            f"state {index.fqn!r} holds an array, or a tensor where the planner does not look; "
            "make it a torch tensor under a key of its own"
        )
    return encoded.tree


def _decoded(tree: JSON) -> object:
    def no_tensor(_owner: str, key: str) -> Any:
        raise ValueError(f"unexpected tensor {key!r}")

    return decode(NAME, tree, no_tensor, no_tensor)


def _layout(metadata: Metadata, results: list[WriteResult]) -> dict[str, JSON]:
    """Everything of DCP's metadata that a reader needs, as JSON."""
    stored = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for r in results}
    tensors: dict[str, JSON] = {}
    values: dict[str, JSON] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            values[fqn] = stored[fqn, ()].value
            continue
        chunks: list[JSON] = []
        for chunk in entry.chunks:
            offsets = tuple(chunk.offsets)
            found = stored.get((fqn, offsets)) or stored[fqn, ()]
            chunks.append(
                {
                    "offsets": [int(o) for o in offsets],
                    "sizes": [int(s) for s in chunk.sizes],
                    "file": found.file,
                    "key": found.key,
                }
            )
        tensors[fqn] = {
            "dtype": torch_tensors.dtype_name(entry.properties.dtype),
            "size": [int(s) for s in entry.size],
            "chunks": chunks,
        }
    planner = Encoder().encode("planner", metadata.planner_data).tree
    return {"tensors": tensors, "values": values, "planner": planner}


def _check_same_save(temp: str, results: list[WriteResult]) -> None:
    if any(result.storage_data.temp != temp for result in results):
        raise SaveError(
            f"`{temp}` was begun while this writer had another save under way; "
            "use one `DcpWriter` for each save"
        )


def _check_visible(fs: Fs, temp: str, files: Mapping[str, FileEntry]) -> None:
    seen = {entry.name: entry.size for entry in fs.listdir(temp)}
    for file, entry in files.items():
        if seen.get(file) != entry.size:
            raise SaveError(
                f"`{temp}/{file}` was written by another rank and is not visible here; "
                "the checkpoint directory must be on storage that all ranks share"
            )
