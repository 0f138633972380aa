"""JSON as we write it (canonical, byte-stable) and as we read it (trusting nothing)."""

from __future__ import annotations

import json
import math
import re
from typing import TypeAlias

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

MAX_DEPTH = 200
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)


def dumps(value: object, *, sort_keys: bool = True) -> bytes:
    """Canonical bytes: sorted keys (unless their order is data), no spaces, ASCII, no nan."""
    text = json.dumps(
        value, sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii") + b"\n"


def loads(data: bytes, what: str) -> JSON:
    """Parse; ValueError naming `what` on bad UTF-8, duplicate keys, NaN, or deep nesting."""
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        value: JSON = json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"`{what}` is not valid JSON: {error}") from None
    return value


def encode_float(value: float) -> JSON:
    """A float as JSON, with nan and infinities tagged because JSON has none."""
    if math.isfinite(value):
        return value
    return {"$float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}


def decode_float(value: JSON) -> float:
    """Inverse of `encode_float`; also accepts an int."""
    if isinstance(value, dict) and set(value) == {"$float"}:
        tag = value["$float"]
        if tag in ("nan", "inf", "-inf"):
            return float(str(tag))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise ValueError(f"{value!r} is not a number")


def _no_duplicates(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:80]!r} appears twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> JSON:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]!r} is out of range")
    return value


def _check_depth(text: str) -> None:
    """Reject nesting that could exhaust the parser's stack, before parsing."""
    depth = 0
    for match in _BRACKETS.finditer(text):
        char = match.group()
        if char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        elif char in "]}":
            depth -= 1
