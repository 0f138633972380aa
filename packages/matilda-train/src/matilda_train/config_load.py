"""From a JSON file and `--set a.b=c` to a `RunConfig`, with errors a person can act on."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matilda_train.config import RunConfig

__all__ = [
    "apply_override",
    "config_differences",
    "config_from_dict",
    "config_identity",
    "config_to_dict",
    "flatten_sections",
    "load_config",
    "shared_fields",
]

# Sections and fields that change no weight: a resumed run may set them anew.
FREE_ON_RESUME = (
    "data.dir",
    "data.corpus",
    "eval.",
    "ckpt.",
    "log.",
    "train.hang_seconds",
)
# The recipe stays the same, but sums are taken in another order, or what happens to a spike
# changes: allowed, with a warning.
ROUNDING_ON_RESUME = (
    "model.attention",
    "model.loss",
    "model.matmul",
    "model.norm",
    "optim.backend",
    "optim.distribute",
    "train.micro_batch_size",
    "train.device",
    "train.check_kernels",
    "train.compile",
    "train.parallel",
    "train.deterministic",
    "train.threads",
    "train.spike_",
    "train.rollback_margin_steps",
    "train.max_rollbacks",
    "train.max_consecutive_skips",
)

# Far beyond any run; what is computed from numbers between them neither overflows nor vanishes.
LARGEST_NUMBER, SMALLEST_NUMBER = 10**18, 1e-30


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a JSON config and apply overrides of the form `section.field=value`.

    Values are JSON where they parse as JSON (`3`, `0.1`, `true`, `null`, `[0.9, 0.95]`), else
    text. Raises `ValueError`, one sentence, for a missing or malformed file, an unknown key (with
    the nearest known one), a wrong type, or a value out of range.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"Config file {str(path)!r} {problem}.{_nearby_config(path)}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        raw = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Config file {str(path)!r} is not valid JSON: {error}{_slip(error)}."
        ) from None
    if not isinstance(raw, dict):
        raise ValueError(f"Config file {str(path)!r} must hold one JSON object of sections.")
    for override in overrides:
        apply_override(raw, override)
    return config_from_dict(raw)


def config_from_dict(raw: Mapping[str, Any]) -> RunConfig:
    """Validate JSON-able sections, such as those of a `run.json`; errors as `load_config`'s."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"A config must be an object of sections, not {_shown(raw)}.")
    config = _build(RunConfig, raw, "")
    assert isinstance(config, RunConfig)
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as JSON-able sections, every default spelled out; `load_config` reads it back."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def config_identity(config: RunConfig) -> str:
    """SHA-256 over the recipe: everything in the config but what a resumed run may set anew."""
    fields = {
        name: value
        for name, value in flatten_sections(config_to_dict(config)).items()
        if not name.startswith(FREE_ON_RESUME + ROUNDING_ON_RESUME)
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class ConfigDifferences(NamedTuple):
    """Fields that differ, by name, each as `old → new`."""

    recipe: dict[str, str]
    """They make it another run."""
    rounding: dict[str, str]
    """Allowed on resume, at the price of bitwise equality with an uninterrupted run."""
    free: dict[str, str]
    """They change no weight."""


def config_differences(old: Mapping[str, Any], config: RunConfig) -> ConfigDifferences:
    """How a stored config differs from `config`."""
    # A field that an older version did not know has its default, which changes nothing.
    before = flatten_sections(config_to_dict(config_from_dict(old)))
    after = flatten_sections(config_to_dict(config))
    found = ConfigDifferences({}, {}, {})
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name):
            continue
        kind = found.recipe
        if name.startswith(ROUNDING_ON_RESUME):
            kind = found.rounding
        elif name.startswith(FREE_ON_RESUME):
            kind = found.free
        kind[name] = f"{before.get(name)!r} → {after.get(name)!r}"
    return found


def shared_fields(config: RunConfig) -> dict[str, Any]:
    """Every field by its name, but for where the data lie: that each machine knows for itself."""
    fields = flatten_sections(config_to_dict(config))
    return {name: value for name, value in fields.items() if name != "data.dir"}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a repeated name, JSON's own reader would silently take the last."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"`{name}` is there twice in one object; keep one")
    return dict(pairs)


def _slip(error: Exception) -> str:
    """What was probably typed there that JSON has not; empty if nobody can tell."""
    if not isinstance(error, json.JSONDecodeError):
        return ""
    before, rest = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip(", \t\r\n")
    if not error.doc.strip():
        return "; the file is empty"
    if rest.startswith(("//", "/*", "#")):
        return "; JSON has no comments, so remove this one"
    if rest[:1] in ("}", "]") and (before.endswith(",") or error.doc[error.pos] == ","):
        return f"; remove the comma before `{rest[0]}`"
    return "; write it in double quotes" if rest.startswith("'") else ""


def _nearby_config(path: Path) -> str:
    for folder in (path.parent, path if path.is_dir() else Path("configs")):
        names = [p.name for p in folder.glob("*.json")]
        close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
        if close:
            return f" Did you mean {str(folder / close[0])!r}?"
        if folder == path:
            return f" It holds {', '.join(sorted(names)) or 'no config'}."
    return ""


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Put one `section.field=value` into the sections of `raw`; `ValueError` if it is none."""
    name, separator, text = override.partition("=")
    parts = name.split(".")
    if not separator or len(parts) != 2 or not all(parts):
        fields = [
            f"`{section}.{name}`"
            for section, cls in typing.get_type_hints(RunConfig).items()
            if dataclasses.is_dataclass(cls) and name in {f.name for f in dataclasses.fields(cls)}
        ]
        hint = f" Did you mean {' or '.join(fields)}?" if fields else ""
        raise ValueError(
            f"`--set` takes section.field=value without spaces, but got {override!r}.{hint}"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a number of thousands of digits is the former, too
        value = text
    section = raw.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise ValueError(f"Section `{parts[0]}` must be a JSON object.")
    section[parts[1]] = value


def _build(cls: type, raw: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    kwargs: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f" Did you mean `{prefix}{close[0]}`?" if close else ""
            raise ValueError(f"Unknown config key `{name}`.{hint} Known here: {', '.join(known)}.")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"Section `{name}` must be a JSON object, not {_shown(value)}.")
            section = hints[key]
            assert isinstance(section, type)
            kwargs[key] = _build(section, value, f"{name}.")
        else:
            kwargs[key] = _checked(value, hints[key], name)
    try:
        return cls(**kwargs)
    except ValueError as error:
        where = f"In section `{prefix.rstrip('.')}`: " if prefix else ""
        message = str(error)
        raise ValueError(message if not where or prefix in message else where + message) from None


def _checked(value: Any, hint: Any, name: str) -> Any:
    """`value` if it has the annotated type; lists become tuples, ints become floats."""
    if isinstance(value, int | float) and (
        LARGEST_NUMBER < abs(value) < math.inf or 0 < abs(value) < SMALLEST_NUMBER
    ):
        raise ValueError(
            f"`{name}` is {_shown(value)}, but must be 0 or from 10^-30 to 10^18 in magnitude."
        )
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in args:
            with contextlib.suppress(ValueError):
                return _checked(value, option, name)
    elif origin is typing.Literal:
        if value in args:
            return value
    elif origin is tuple:
        items = args
        if isinstance(value, list | tuple):
            items = args[:1] * len(value) if args[-1] is Ellipsis else args
            if len(value) == len(items):
                return tuple(
                    _checked(v, t, f"{name}[{i}]")
                    for i, (v, t) in enumerate(zip(value, items, strict=True))
                )
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    words = [str(a) for a in args if isinstance(a, str)]
    close = difflib.get_close_matches(str(value), words, n=1)
    hint_text = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"`{name}` is {_shown(value)}, but must be {_expected(hint)}.{hint_text}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:50]}… ({len(text)} characters)"


def _expected(hint: Any) -> str:
    """What `_checked` takes for `hint`, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _expected(a) for a in args)
    if origin is typing.Literal:
        return f"{'one of ' * (len(args) > 1)}{', '.join(map(repr, args))}"
    if origin is tuple:
        count = f"{args[0].__name__} values" if args[-1] is Ellipsis else f"{len(args)} values"
        return f"a list of {count}"
    if hint is bool:
        return "true or false"
    return f"of type {hint.__name__}{' and finite' * (hint is float)}"


def flatten_sections(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections as one level of `section.field` names."""
    return {
        f"{section}.{name}": value
        for section, fields in sections.items()
        for name, value in fields.items()
    }
