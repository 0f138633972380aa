"""Reading one checkpoint by its path, without a `Checkpointer`: no lock, nothing moved."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from matilda_ckpt.catalog import Catalog
from matilda_ckpt.errors import CheckpointError, OtherFormatError, UnreadableError
from matilda_ckpt.fs import Fs, OsFs
from matilda_ckpt.loading import load_names
from matilda_ckpt.manifest import Manifest
from matilda_ckpt.object_fs import ObjectFs, object_url

SHARDED_NAME = "dcp"
"""The one name of a checkpoint that `DcpWriter` wrote."""
SHARDED = "`DcpWriter` wrote it: load it with `DcpReader`"


def default_threads() -> int:
    """Files written, hashed or read at the same time: one more than cores, at most 8."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return min(8, cores + 1)


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of `verify`."""

    path: Path
    ok: bool
    problem: str | None
    manifest: Manifest | None
    other_format: bool = False
    """It is not damaged, but another version of this package wrote it."""
    unreadable: bool = False
    """It may be intact, but cannot be read at present; see `UnreadableError`."""


def verify(
    path: str | os.PathLike[str], deep: bool = True, *, fs: Fs | None = None
) -> VerifyReport:
    """Check one checkpoint directory: seal, manifest, files, and with `deep` every byte."""
    catalog, name = open_catalog(path, fs)
    try:
        manifest = catalog.verify(name) if deep else catalog.open(name)[0]
    except CheckpointError as error:
        return VerifyReport(
            Path(path),
            False,
            str(error),
            None,
            other_format=isinstance(error, OtherFormatError),
            unreadable=isinstance(error, UnreadableError),
        )
    return VerifyReport(Path(path), True, None, manifest)


def load_state(
    path: str | os.PathLike[str], *, names: Collection[str] | None = None, fs: Fs | None = None
) -> dict[str, object]:
    """Plain nested data of the checkpoint directory `path`, verified while it is read.

    Raises DamagedError when it does not verify, ValueError when a name is not in it.
    """
    catalog, name = open_catalog(path, fs)
    return load_from(catalog, name, names)


def load_from(catalog: Catalog, name: str, names: Collection[str] | None) -> dict[str, object]:
    """`load_state` of the checkpoint `name` in an open catalog."""
    manifest, _ = catalog.open(name)
    wanted = list(manifest.state) if names is None else list(names)
    for item in wanted:
        if item not in manifest.state:
            sharded = f"; {SHARDED}" if SHARDED_NAME in manifest.state else ""
            raise ValueError(
                f"checkpoint `{catalog.root}/{name}` holds no {item!r}; "
                f"it holds {', '.join(sorted(manifest.state))}{sharded}"
            )
    return load_names(catalog, name, manifest, wanted)


def open_catalog(path: str | os.PathLike[str], fs: Fs | None) -> tuple[Catalog, str]:
    """The directory or URL that holds the checkpoint `path`, and its name in there."""
    url = object_url(path)
    if url is not None:
        root, _, name = url.rpartition("/")
        return Catalog(fs or ObjectFs(url), root, threads=default_threads()), name
    full = os.path.abspath(path)  # noqa: PTH100
    root, name = os.path.split(full)
    return Catalog(fs or OsFs(), root, threads=default_threads()), name
