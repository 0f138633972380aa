"""Which files an input names, and how they divide into units of work.

The division depends on the files alone, never on workers or interruptions, and nothing absolute
enters a name: the same tree elsewhere gives the same data set.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from matilda_data.errors import DataError
from matilda_data.manifest import canonical_json

__all__ = ["WORK_DIR", "InputFile", "Unit", "blocks", "check_lists", "find_files", "plan_units"]

logger = logging.getLogger("matilda_data")

# Where a preparation keeps its unfinished work; never text, also where it lies among the inputs.
WORK_DIR = ".prepare"

TEXT_SUFFIXES = (".txt", ".py")
LINE_SUFFIXES = (".jsonl", ".jsonl.zst")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + LINE_SUFFIXES + PARQUET_SUFFIXES

UNIT_BYTES = 16 << 20
BLOCK_BYTES = 1 << 20
ZSTD_WINDOW = 1 << 27
# A compressed file cannot be entered in the middle (each unit decompresses all before it), so its
# units are few.
ZSTD_UNITS = 4


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file to read; `name` is its path below its input's root, with forward slashes."""

    path: str
    name: str
    size: int
    mtime_ns: int
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of work: whole small files, a line range of one file, or row groups of one file."""

    kind: str
    """`"text"`, `"lines"` or `"parquet"`."""
    files: tuple[InputFile, ...]
    start: int = 0
    """First byte (uncompressed) or first row group."""
    stop: int = 0
    """End byte (uncompressed) or end row group."""
    first_line: int = 1
    """Line number (or row number) at `start`."""
    input_bytes: int = field(default=0, compare=False)
    """Uncompressed bytes, for progress."""
    text_field: str = ""
    """Column of the text if it is not the one of `ReadOptions`."""
    blob_url: str = ""
    """Where texts lie if rows only have a `blob_id`, with `{blob_id}` in it."""

    def key(self, settings: dict[str, Any]) -> str:
        """Identity of the part this unit makes under `settings`: content and names, no paths."""
        files = [[file.name, file.size, file.sha256] for file in self.files]
        content = [settings, self.kind, files, self.start, self.stop, self.first_line]
        content += [self.text_field, self.blob_url]
        return hashlib.sha256(canonical_json(content)).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Unit:
        files = tuple(InputFile(**file) for file in value["files"])
        return cls(**{**value, "files": files})


def check_lists(**arguments: object) -> None:
    """Raise DataError for a single name where a list of them is meant: its letters are one too."""
    for name, value in arguments.items():
        if isinstance(value, str | os.PathLike):
            raise DataError(
                f"`{name}` is {os.fspath(value)!r}; give a list, [{os.fspath(value)!r}]"
            )


def find_files(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    exclude: Sequence[str],
    include: Callable[[str], bool] | None,
) -> list[InputFile]:
    """The files that `inputs` name, in the order of `inputs`, then by name.

    What lies in a directory `.prepare` below them is the work of a preparation and left out: an
    output directory among the inputs changes nothing.

    Raises:
        DataError: an input is missing, of an unknown type or unreadable, or nothing is left.
    """
    found: dict[str, InputFile] = {}
    for item in inputs:
        for path, root in _expand(os.fspath(item)):
            name = path.relative_to(root).as_posix()
            if WORK_DIR in name.split("/")[:-1]:
                continue
            if _excluded(name, exclude) or (include is not None and not include(name)):
                continue
            if not name.isascii() and name.encode("utf-8", "replace").decode("utf-8") != name:
                raise DataError(f"the name of input {name!r} is not UTF-8; rename or exclude it")
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(f"cannot read input {str(path)!r}: {error.strerror}") from None
            if not stat.S_ISREG(status.st_mode):
                raise DataError(
                    f"input {str(path)!r} is a pipe, socket or device, which cannot be read twice; "
                    "write its text to a file, or exclude it"
                )
            file = InputFile(
                path=str(path.absolute()),
                name=name,
                size=status.st_size,
                mtime_ns=status.st_mtime_ns,
            )
            found.setdefault(os.path.realpath(path), file)
    if not found:
        wanted = ", ".join(repr(os.fspath(item)) for item in inputs) or "no inputs"
        raise DataError(f"no documents: nothing to read in {wanted} ({', '.join(SUFFIXES)})")
    return list(found.values())


def _expand(item: str) -> list[tuple[Path, Path]]:
    path = Path(item)
    if path.is_dir():
        return [(file, path) for file in _walk(path)]
    if path.exists():
        if not item.endswith(SUFFIXES):
            raise DataError(f"input {item!r} has an unknown type; give {', '.join(SUFFIXES)} files")
        return [(path, path.parent)]
    if glob.has_magic(item):
        parts = path.parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:fixed])
        matches = sorted(root.glob("/".join(parts[fixed:])))
        files = [match for match in matches if match.is_file() and str(match).endswith(SUFFIXES)]
        if files:
            return [(file, root) for file in files]
    raise DataError(
        f"input {item!r} matches no file; give a {', '.join(SUFFIXES)} file, a directory or a glob"
    )


def _walk(directory: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"cannot read input {error.filename!r}: {error.strerror}")

    files: list[Path] = []
    links: list[str] = []
    for parent, folders, names in os.walk(directory, onerror=fail):
        links += [link for name in folders if os.path.islink(link := f"{parent}/{name}")]  # noqa: PTH114
        if WORK_DIR in folders:
            folders.remove(WORK_DIR)  # its files may go at any moment
        files += [Path(parent) / name for name in names if name.endswith(SUFFIXES)]
    if links:
        logger.warning(
            "%d links to directories in %s are not followed, the first is %r; name what they point "
            "to as an input if its text is wanted",
            len(links),
            directory,
            min(links),
        )
    return sorted(files, key=lambda file: file.relative_to(directory).as_posix())


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    parts = name.split("/")
    return any(
        fnmatch.fnmatchcase(name, pattern)
        or any(fnmatch.fnmatchcase(part, pattern) for part in parts)
        for pattern in patterns
    )


def plan_units(files: Iterable[InputFile]) -> list[Unit]:
    """Hash `files` and divide them into units, in order.

    Raises:
        DataError: a file cannot be read, or is not what its name says.
    """
    units: list[Unit] = []
    group: list[InputFile] = []
    group_bytes = 0
    for file in files:
        if file.name.endswith(TEXT_SUFFIXES):
            if group and group_bytes + file.size > UNIT_BYTES:
                units.append(_text_unit(group))
                group, group_bytes = [], 0
            group.append(_with_hash(file, _hash_file(file)))
            group_bytes += file.size
            continue
        if group:
            units.append(_text_unit(group))
            group, group_bytes = [], 0
        if file.name.endswith(LINE_SUFFIXES):
            units.extend(_line_units(file))
        else:
            units.extend(_parquet_units(file))
    if group:
        units.append(_text_unit(group))
    return units


def _with_hash(file: InputFile, sha256: str) -> InputFile:
    return InputFile(**{**asdict(file), "sha256": sha256})


def _hash_file(file: InputFile) -> str:
    try:
        with Path(file.path).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read input {file.path!r}: {error.strerror}") from None


def _text_unit(group: list[InputFile]) -> Unit:
    size = sum(file.size for file in group)
    return Unit(kind="text", files=tuple(group), stop=len(group), input_bytes=size)


def _line_units(file: InputFile) -> list[Unit]:
    sha256 = _hash_file(file)
    compressed = file.name.endswith(".zst")
    # Cut after the first newline at or past each multiple of the unit size.
    cuts, lines = [(0, 1)], 1
    position, target = 0, UNIT_BYTES
    for block in blocks(file):
        end = position + len(block)
        counted = 0
        while target <= end:
            newline = block.find(b"\n", max(target - 1 - position, 0))
            if newline == -1:
                break
            cut = position + newline + 1
            lines += block.count(b"\n", counted, newline + 1)
            counted = newline + 1
            cuts.append((cut, lines))
            target = UNIT_BYTES * (cut // UNIT_BYTES + 1)
        lines += block.count(b"\n", counted)
        position = end
    if compressed:
        cuts = cuts[:: -(-len(cuts) // ZSTD_UNITS)]
    hashed = _with_hash(file, sha256)
    ends = [cut for cut, _ in cuts[1:]] + [position]
    return [
        Unit(
            kind="lines",
            files=(hashed,),
            start=start,
            stop=stop,
            first_line=line,
            input_bytes=stop - start,
        )
        for (start, line), stop in zip(cuts, ends, strict=True)
        if stop > start
    ]


def _parquet_units(file: InputFile) -> list[Unit]:
    parquet = import_parquet()
    try:
        metadata = parquet.read_metadata(file.path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot read {file.path!r} as parquet: {reason}") from None
    hashed = _with_hash(file, _hash_file(file))
    units: list[Unit] = []
    start = row = first_row = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        row += metadata.row_group(group).num_rows
        if size >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            units.append(
                Unit(
                    kind="parquet",
                    files=(hashed,),
                    start=start,
                    stop=group + 1,
                    first_line=first_row + 1,
                    input_bytes=size,
                )
            )
            start, first_row, size = group + 1, row, 0
    return units


def import_parquet() -> Any:
    """`pyarrow.parquet`, or a DataError that says which extra has it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "reading parquet needs pyarrow; install it with: pip install 'matilda-data[parquet]'"
        ) from None
    return pyarrow.parquet


def blocks(file: InputFile, start: int = 0) -> Iterator[bytes]:
    """The uncompressed content of a `.jsonl` or `.jsonl.zst` file from byte `start` on, in blocks.

    Raises:
        DataError: unreadable, not zstd, or a zstd stream that was cut.
    """
    try:
        with Path(file.path).open("rb") as opened:
            if not file.name.endswith(".zst"):
                opened.seek(start)
                while block := opened.read(BLOCK_BYTES):
                    yield block
                return
            position = 0
            for block in _decompressed(opened, file.path):
                position += len(block)
                if position > start:
                    yield block[max(start - (position - len(block)), 0) :]
    except OSError as error:
        raise DataError(f"cannot read input {file.path!r}: {error.strerror}") from None
    except zstandard.ZstdError as error:
        raise DataError(f"cannot decompress {file.path!r}: {error}") from None


def _decompressed(opened: BinaryIO, path: str) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    frame, whole = decompressor.decompressobj(), True
    while raw := opened.read(BLOCK_BYTES >> 4):
        while raw:
            if frame.eof:
                frame = decompressor.decompressobj()
            if block := frame.decompress(raw):
                yield block
            whole = frame.eof
            raw = frame.unused_data if frame.eof else b""
    if not whole:
        raise DataError(f"input {path!r} is truncated: its zstd stream has no end")
