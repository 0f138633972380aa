"""The Hugging Face hub through its own clients: which files there are, and verified copies."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matilda_data.durable import write_durably
from matilda_data.errors import DataError
from matilda_data.inputs import SUFFIXES, InputFile, Unit, plan_units
from matilda_data.manifest import canonical_json
from matilda_data.persistence import Retry
from matilda_data.prepare import Settings, check_source
from matilda_data.progress import Meter
from matilda_data.shard import file_sha256

__all__ = ["HubFile", "HubFiles", "HubSource", "take_over_plans"]

DOWNLOADS_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A data set of the hub as a part of a mixture."""

    name: str
    """Letters, digits, `-` and `.`; part of shard file names."""
    dataset: str
    """Repository, such as `"HuggingFaceTB/smollm-corpus"`."""
    config: str | None = None
    """Configuration (subset), None for the default one."""
    split: str = "train"
    """Split of the hub's data set that is read."""
    revision: str = "main"
    """Commit hash; a branch is looked up once and the commit recorded."""
    weight: int = 1
    """Integer weight in the mixture, and this source's share of the tokens."""
    text_field: str = "text"
    """Column that holds the text."""
    blob_url: str = ""
    """Where texts lie if rows only have a `blob_id`, with `{blob_id}` in it."""

    def __post_init__(self) -> None:
        check_source(self.name, self.weight)


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a pinned revision."""

    path: str
    size: int
    sha256: str
    """Stated by the hub for large files; empty for others, which have a git blob id only."""
    blob_id: str


class HubFiles:
    """The hub's files, as far as they are here."""

    def __init__(self, work: Path, settings: Settings, retry: Retry, meter: Meter) -> None:
        self._work = work
        self._settings = settings
        self._retry = retry
        self._meter = meter
        self._slots = threading.Semaphore(DOWNLOADS_AHEAD)
        self._stopping = threading.Event()
        self._downloads: dict[str, Future[Path]] = {}
        self._origins: dict[str, tuple[str, str, HubFile]] = {}
        work.mkdir(exist_ok=True)

    def close(self) -> None:
        """Start no further download; those under way end with the process."""
        self._stopping.set()

    def _note(self, text: str) -> None:
        self._meter.report("download", text)

    def resolve(self, source: HubSource) -> tuple[str, list[HubFile]]:
        """The commit that `source` is pinned to, and its files in order; asked once, then kept."""
        request = [source.dataset, source.config, source.split, source.revision]
        name = hashlib.sha256(canonical_json(request)).hexdigest()[:32]
        record = self._work / f"files-{name}.json"
        try:
            value = json.loads(record.read_bytes())
            return value["commit"], [HubFile(**file) for file in value["files"]]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        datasets, hub_errors = _import_clients()
        commit, files = self._retry.call(
            lambda: _ask_hub(source, self._work / "cache"),
            f"looking up {source.dataset!r} on the hub",
            final=(
                hub_errors.RepositoryNotFoundError,
                hub_errors.RevisionNotFoundError,
                hub_errors.OfflineModeIsEnabled,
                datasets.exceptions.DatasetNotFoundError,
                _NoSuchPartError,
            ),
            note=self._note,
        )
        content = {"commit": commit, "files": [asdict(file) for file in files]}
        write_durably(record, canonical_json(content))
        return commit, files

    def _local(self, file: HubFile) -> Path:
        suffix = next(suffix for suffix in SUFFIXES if file.path.endswith(suffix))
        return self._work / f"{file.sha256 or file.blob_id}{suffix}"

    def plan(self, source: HubSource, commit: str, file: HubFile) -> list[tuple[str, Unit]]:
        """The units of one file, keyed; the file is fetched unless that is known."""
        local = self._local(file)
        self._origins[str(local.absolute())] = (source.dataset, commit, file)
        record = local.with_name(f"units-{local.name}.json")
        try:
            units = [Unit.from_json(value) for value in json.loads(record.read_bytes())]
        except (OSError, ValueError, KeyError, TypeError):
            self._fetch(source.dataset, commit, file)
            found = InputFile(
                path=str(local.absolute()), name=file.path, size=local.stat().st_size, mtime_ns=0
            )
            units = plan_units([found])
            write_durably(record, canonical_json([unit.to_json() for unit in units]))
        own = [
            replace(
                unit,
                files=tuple(replace(each, path=str(local.absolute())) for each in unit.files),
                text_field="" if source.text_field == "text" else source.text_field,
                blob_url=source.blob_url,
            )
            for unit in units
        ]
        settings = self._settings.unit_settings()
        return [(unit.key(settings), unit) for unit in own]

    def provide(self, units: Sequence[Unit]) -> None:
        """Have the files of `units` here."""
        for path in {file.path for unit in units for file in unit.files}:
            self._fetch(*self._origins[path])

    def look_ahead(self, source: HubSource, commit: str, file: HubFile) -> None:
        """Start fetching a file that will be wanted."""
        self._start(source.dataset, commit, file)

    def remove_files(self, units: Sequence[Unit]) -> None:
        """Remove the files of `units`, which are encoded."""
        for path in {file.path for unit in units for file in unit.files}:
            self._downloads.pop(path, None)
            Path(path).unlink(missing_ok=True)

    def _start(self, dataset: str, commit: str, file: HubFile) -> Future[Path]:
        key = str(self._local(file).absolute())
        if key not in self._downloads:
            future = self._downloads[key] = Future[Path]()

            def download() -> None:
                try:
                    with self._slots:
                        future.set_result(self._download(dataset, commit, file))
                except BaseException as error:
                    future.set_exception(error)

            # Not an executor's thread, which would keep a process that was stopped until it ends.
            threading.Thread(target=download, name="matilda-data-hub", daemon=True).start()
        return self._downloads[key]

    def _fetch(self, dataset: str, commit: str, file: HubFile) -> Path:
        return self._start(dataset, commit, file).result()

    def _download(self, dataset: str, commit: str, file: HubFile) -> Path:
        target = self._local(file)
        if self._stopping.is_set():
            raise DataError("stopped")
        if target.exists() and _is_file(target, file):
            return target
        folder = self._work / f"download-{target.name}"
        path = self._retry.call(
            lambda: _download_checked(dataset, commit, file, folder),
            f"fetching {file.path!r} of {dataset!r}",
            note=self._note,
            stopping=self._stopping,
        )
        path.replace(target)
        shutil.rmtree(folder, ignore_errors=True)
        return target


def take_over_plans(other: Path, work: Path) -> None:
    """Copy what a partition knows of the hub, so that no file is fetched only to be divided."""
    (work / "hub").mkdir(exist_ok=True)
    for record in sorted((other / "hub").glob("*.json")):
        if not (work / "hub" / record.name).exists():
            write_durably(work / "hub" / record.name, record.read_bytes())


class _NoSuchPartError(DataError):
    """The data set has no such configuration or split, or no files that can be read."""


def _import_clients() -> tuple[Any, Any]:
    try:
        return (
            importlib.import_module("datasets"),
            importlib.import_module("huggingface_hub.errors"),
        )
    except ImportError:
        raise DataError(
            "reading from the hub needs `datasets`; install it with: "
            "pip install 'matilda-data[hub,parquet]'"
        ) from None


def _ask_hub(source: HubSource, cache: Path) -> tuple[str, list[HubFile]]:
    """Commit and files, as the hub's own clients find them."""
    datasets = importlib.import_module("datasets")
    api = importlib.import_module("huggingface_hub").HfApi()
    commit = api.dataset_info(source.dataset, revision=source.revision).sha
    names = (
        datasets.get_dataset_config_names(source.dataset, revision=commit, cache_dir=str(cache))
        if source.config is not None
        else []
    )
    if source.config is not None and source.config not in names:
        raise _NoSuchPartError(
            f"{source.dataset!r} has no configuration {source.config!r}; it has {', '.join(names)}"
        )
    builder = datasets.load_dataset_builder(
        source.dataset, name=source.config, revision=commit, cache_dir=str(cache)
    )
    found = builder.config.data_files or {}
    if source.split not in found:
        raise _NoSuchPartError(
            f"{source.dataset!r} has no split {source.split!r}; it has {', '.join(map(str, found))}"
        )
    prefix = f"hf://datasets/{source.dataset}@{commit}/"
    paths = [str(address).removeprefix(prefix) for address in found[source.split]]
    if not paths or any("://" in path or not path.endswith(SUFFIXES) for path in paths):
        raise _NoSuchPartError(
            f"{source.dataset!r} has files that cannot be read; known are {', '.join(SUFFIXES)}"
        )
    infos = {
        info.path: info
        for first in range(0, len(paths), 100)
        for info in api.get_paths_info(
            source.dataset, paths[first : first + 100], repo_type="dataset", revision=commit
        )
    }
    return commit, [
        HubFile(
            path=path,
            size=infos[path].size,
            sha256=infos[path].lfs.sha256 if infos[path].lfs else "",
            blob_id=infos[path].blob_id,
        )
        for path in paths
    ]


def _download_checked(dataset: str, commit: str, file: HubFile, folder: Path) -> Path:
    hub = importlib.import_module("huggingface_hub")
    tqdm = importlib.import_module("tqdm").tqdm

    class Silent(tqdm):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": True})

    path = Path(
        hub.hf_hub_download(
            dataset,
            file.path,
            repo_type="dataset",
            revision=commit,
            local_dir=str(folder),
            tqdm_class=Silent,
        )
    )
    if not _is_file(path, file):
        shutil.rmtree(folder, ignore_errors=True)  # also what a resumed download would build on
        raise DataError(f"{file.path!r} arrived damaged")
    return path


def _is_file(path: Path, file: HubFile) -> bool:
    """Whether `path` holds the very content that the hub states for `file`."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256:
        return file_sha256(path) == file.sha256
    raw = path.read_bytes()
    sha1 = hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False)
    return sha1.hexdigest() == file.blob_id
