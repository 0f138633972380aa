"""`matilda-ckpt`: look at, check and look after checkpoints.

Exit status: 0 fine; 1 damage or difference found, or a checkpoint that could not be checked; 2 a
mistake in the call, or nothing to read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from matilda_ckpt.arguments import TeachingParser
from matilda_ckpt.catalog import CheckpointInfo, parse_name
from matilda_ckpt.checkpointer import Checkpointer
from matilda_ckpt.errors import CheckpointError
from matilda_ckpt.manifest import COMMIT_NAME, MANIFEST_NAME
from matilda_ckpt.object_fs import object_url
from matilda_ckpt.reading import VerifyReport, open_catalog, verify
from matilda_ckpt.retention import Keep, victims

EXAMPLES = """examples:
  matilda-ckpt ls runs/hero                      every checkpoint, newest first
  matilda-ckpt verify runs/hero && echo intact   every byte of every one
  matilda-ckpt diff runs/a runs/b                the newest of each
  matilda-ckpt gc runs/hero --last 3 --best val_loss_nats:2:min --dry-run
  matilda-ckpt ls runs/hero --json | jq '.[0].step'

Exit codes: 0 all is well; 1 something is damaged, differs, was put aside or could not be checked
(another format, unreadable); 2 bad input, or a failure, in one sentence.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], tuple[int, object, str]] = parsed.run
    try:
        status, data, text = run(parsed)
    except (CheckpointError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    if parsed.json:
        text = json.dumps(_plain(data), indent=2, allow_nan=False)
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stderr.close()
    return status


def _parser() -> argparse.ArgumentParser:
    parser = TeachingParser(prog="matilda-ckpt", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(
        name: str, run: Callable[[argparse.Namespace], tuple[int, object, str]], about: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        return command

    whole = "directory (or s3:// URL) of checkpoints, or run directory with `checkpoints`"
    where = f"{whole}, or one checkpoint"
    add("ls", _ls, "list checkpoints, newest first").add_argument("path", type=Path, help=where)
    check = add("verify", _verify, "check every byte against its SHA-256")
    check.add_argument("path", type=Path, help=where)
    check.add_argument("--shallow", action="store_true", help="seals, names and sizes only")
    inspect = add("inspect", _inspect, "show what one checkpoint holds")
    inspect.add_argument("path", type=Path, help="one checkpoint, or a directory: its newest")
    differ = add("diff", _diff, "name the tensors and values that differ, and by how much")
    differ.add_argument("a", type=Path, help="one checkpoint, or a directory: its newest")
    differ.add_argument("b", type=Path, help="the other")
    gc = add("gc", _gc, "delete what a retention rule does not keep")
    gc.add_argument("path", type=Path, help=whole)
    gc.add_argument("--last", type=int, required=True, metavar="N", help="keep the newest N")
    gc.add_argument("--every", type=int, metavar="N", help="and every step divisible by N")
    gc.add_argument(
        "--hours", type=float, metavar="H", help="and the first of every span of H hours"
    )
    gc.add_argument("--best", metavar="METRIC:N:min|max", help="and the best N by a metric")
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    export = add("export", _export, "write plain weights as one safetensors file")
    export.add_argument("path", type=Path, help="one checkpoint, or a directory: its newest")
    export.add_argument("out", type=Path, help="new file")
    export.add_argument("--name", default="model", help="state name (default: model)")
    repair = add("repair", _repair, "quarantine what is damaged and clear what dead writers left")
    repair.add_argument("path", type=Path, help=whole)
    torture = add("torture", _torture, "run the crash suite on this directory's file system")
    torture.add_argument("path", type=Path, help="existing directory to work in")
    torture.add_argument("--quick", action="store_true", help="a sample, in about a minute")
    return parser


def _root(path: Path) -> Path:
    """The directory of checkpoints that `path` means."""
    if object_url(path):
        return path
    if not path.is_dir():
        raise ValueError(f"`{path}` is not a directory")
    nested = path / "checkpoints"
    if nested.is_dir() and not (path / COMMIT_NAME).exists():
        return nested
    return path


def _selection(path: Path) -> list[CheckpointInfo]:
    """The one checkpoint at `path`, or all of a directory, newest first."""
    root = _root(path)
    if parse_name(root.name) or (root / MANIFEST_NAME).exists():
        report = verify(root, deep=False)
        if report.manifest is None:
            return [
                CheckpointInfo(
                    root.name,
                    str(root),
                    -1,
                    problem=report.problem,
                    other_format=report.other_format,
                    unreadable=report.unreadable,
                )
            ]
        manifest = report.manifest
        return [
            CheckpointInfo(
                root.name,
                str(root),
                manifest.step,
                manifest.sequence,
                manifest.created,
                manifest.total_bytes,
                manifest.healthy and manifest.finite,
                manifest.metrics,
            )
        ]
    return Checkpointer(root, read_only=True).list()


def _one(path: Path) -> CheckpointInfo:
    for info in _selection(path):
        if info.problem is None:
            return info
    raise ValueError(f"`{path}` holds no intact checkpoint; look with `matilda-ckpt ls`")


def _trouble(found: CheckpointInfo | VerifyReport) -> str:
    """In two words at most why it cannot be used; "" when it can."""
    if found.problem is None:
        return ""
    if found.other_format:
        return "other format"
    return "unreadable" if found.unreadable else "damaged"


def _state(info: CheckpointInfo, report: VerifyReport) -> str:
    """The same after a check, or "ok", or "retired": a live run deletes beside us."""
    trouble = _trouble(report)
    if trouble == "damaged":
        catalog, name = open_catalog(info.path, None)
        if catalog.retired(name):
            return "retired"
    return trouble or "ok"


def _ls(options: argparse.Namespace) -> tuple[int, object, str]:
    found = _selection(options.path)
    rows = [
        (
            info.name,
            str(info.step),
            _size(info.bytes),
            info.created[:19].replace("T", " "),
            _trouble(info) or ("healthy" if info.healthy else "unhealthy"),
            info.problem or "  ".join(f"{k}={v:.5g}" for k, v in sorted(info.metrics.items())),
        )
        for info in found
    ]
    text = _table(("name", "step", "size", "created (UTC)", "state", ""), rows)
    return int(any(info.problem for info in found)), found, text or "no checkpoints"


def _verify(options: argparse.Namespace) -> tuple[int, object, str]:
    found = _selection(options.path)
    if not found:
        raise ValueError(f"`{options.path}` holds no checkpoint to verify")
    reports = []
    for done, info in enumerate(found, start=1):
        if sys.stderr.isatty() and not options.json:
            _progress(f"{info.name} ({done} of {len(found)})")
        report = verify(info.path, deep=not options.shallow)
        reports.append((info, report, _state(info, report)))
    rows = [
        (
            info.name,
            state.replace("damaged", "DAMAGED"),
            _size(info.bytes),
            "deleted while this ran" if state == "retired" else report.problem or "",
        )
        for info, report, state in reports
    ]
    data = [
        {
            "name": info.name,
            "ok": None if state == "retired" else report.ok,
            "state": state,
            "problem": None if state == "retired" else report.problem,
        }
        for info, report, state in reports
    ]
    text = _table(("name", "", "size", ""), rows)
    bad = [state for _, _, state in reports if state not in ("ok", "retired")]
    return int(bool(bad)), data, text


def _inspect(options: argparse.Namespace) -> tuple[int, object, str]:
    info = _one(options.path)
    manifest = verify(info.path, deep=False).manifest
    assert manifest is not None
    facts = {
        "path": info.path,
        "step": manifest.step,
        "sequence": manifest.sequence,
        "run_id": manifest.run_id,
        "created": manifest.created,
        "parent": manifest.parent,
        "healthy": manifest.healthy,
        "finite": manifest.finite,
        "bytes": manifest.total_bytes,
        "metrics": dict(manifest.metrics),
        "provenance": dict(manifest.provenance),
    }
    tensors = [
        {
            "name": f"{name}/{key}",
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": tensor.end - tensor.start,
            "sha256": tensor.sha256,
        }
        for name, entry in manifest.state.items()
        for file in entry.tensors
        for key, tensor in manifest.files[file].tensors.items()
    ]
    rows = [
        (
            str(tensor["name"]),
            str(tensor["dtype"]),
            "×".join(map(str, tensor["shape"])) or "scalar",  # type: ignore[call-overload]
            _size(int(str(tensor["bytes"]))),
            str(tensor["sha256"])[:12],
        )
        for tensor in tensors
    ]
    head = "\n".join(f"{key:<11} {value}" for key, value in facts.items())
    table = _table(("tensor", "dtype", "shape", "size", "sha256"), rows)
    return 0, {**facts, "state": list(manifest.state), "tensors": tensors}, f"{head}\n\n{table}"


def _diff(options: argparse.Namespace) -> tuple[int, object, str]:
    from matilda_ckpt.comparison import compare

    result = compare(_one(options.a).path, _one(options.b).path)
    rows = [
        (
            change.name,
            change.what,
            "" if change.differing is None else f"{change.differing:,} of {change.elements:,}",
            "" if change.max_abs is None else f"{change.max_abs:.3e}",
            "" if change.relative_l2 is None else f"{change.relative_l2:.3e}",
        )
        for change in result.tensors
    ]
    parts = [_table(("tensor", "", "elements", "max |a−b|", "relative L2"), rows)]
    parts += ["\n".join(result.values)]
    parts += [
        f"{result.equal_tensors} tensors equal, {len(result.tensors)} differ, "
        f"{len(result.values)} other values differ"
    ]
    return int(not result.same), asdict(result), "\n\n".join(part for part in parts if part)


def _gc(options: argparse.Namespace) -> tuple[int, object, str]:
    best = None
    if options.best:
        parts = options.best.rsplit(":", 2)
        if len(parts) != 3 or not parts[1].isdecimal() or len(parts[1]) > 18:
            raise ValueError(f"`--best` must be METRIC:N:min or METRIC:N:max, not {options.best!r}")
        best = (parts[0], int(parts[1]), parts[2])
    keep = Keep(last=options.last, every=options.every, hours=options.hours, best=best)
    root = _root(options.path)
    if options.dry_run:
        found = Checkpointer(root, read_only=True).list()
        gone = victims([info for info in found if info.problem is None], keep)
    else:
        with Checkpointer(root) as checkpoints:
            gone = checkpoints.retire(keep)
    verb = "would delete" if options.dry_run else "deleted"
    text = f"{verb} {len(gone)}: {', '.join(gone)}" if gone else "nothing to delete"
    return 0, {"deleted": gone, "dry_run": options.dry_run}, text


def _export(options: argparse.Namespace) -> tuple[int, object, str]:
    from matilda_ckpt.export import export

    info = _one(options.path)
    size = export(info.path, options.out, name=options.name)
    text = f"wrote {options.out} ({_size(size)}) from {info.name}"
    return 0, {"from": info.path, "to": str(options.out), "bytes": size}, text


def _repair(options: argparse.Namespace) -> tuple[int, object, str]:
    with Checkpointer(_root(options.path)) as checkpoints:
        skipped = checkpoints.repair()
        stays = {skip.name: skip for skip in skipped if skip.moved_to is None}
        intact = [info for info in checkpoints.list() if info.name not in stays]
    moved = [skip for skip in skipped if skip.moved_to is not None]
    lines = [f"{skip.name} → {skip.moved_to}: {skip.reason}" for skip in moved]
    lines += [f"{skip.name} stays, not checked: {skip.reason}" for skip in stays.values()]
    lines.append(
        f"{len(intact)} intact, {len(moved)} quarantined"
        + (f", {len(stays)} not checked" if stays else "")
    )
    data = {"quarantined": moved, "intact": intact, "not_checked": list(stays.values())}
    return int(bool(skipped)), data, "\n".join(lines)


def _torture(options: argparse.Namespace) -> tuple[int, object, str]:
    from matilda_ckpt.torture.suite import run_all

    rows = run_all(_root(options.path), quick=options.quick, say=lambda text: _progress(text))
    text = _table(
        ("suite", "case", "points", "states", "violations", ""),
        [
            (r.suite, r.case, f"{r.points:,}", f"{r.states:,}", str(len(r.violations)), r.note)
            for r in rows
        ],
    )
    bad = [violation for row in rows for violation in row.violations]
    text += "\n\n" + ("\n".join(bad[:20]) if bad else "no violation found")
    return int(bool(bad)), [asdict(row) for row in rows], text


def _progress(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _plain(value: object) -> object:
    """For JSON: dataclasses as objects, paths as text, nan and infinities as null."""
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(getattr(value, key)) for key in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
