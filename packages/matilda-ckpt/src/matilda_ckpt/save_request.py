"""From what a caller hands to `save` to what the store writes: checked, encoded, described."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from matilda_ckpt import strict_json
from matilda_ckpt.manifest import MAX_JSON_BYTES, check_state_name
from matilda_ckpt.restored import unwrapped
from matilda_ckpt.state_tree import Encoder
from matilda_ckpt.store import Part, SaveRequest
from matilda_ckpt.strict_json import JSON

MAX_STEP = 10**18 - 1
_SHARD_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}")


def save_request(
    step: int,
    state: Mapping[str, object],
    encoder: Encoder,
    *,
    metrics: Mapping[str, float],
    provenance: Mapping[str, JSON],
    healthy: bool,
    alive: Callable[[], None],
    shard_bytes: int,
    finite_only: bool,
) -> SaveRequest:
    """Arguments as in `Checkpointer.save`; ValueError for what cannot be stored."""
    _check(step, state)
    numbers = _numbers(metrics)
    try:
        # As a part of the manifest, read back by the reader's own rules.
        strict_json.loads(strict_json.dumps({"provenance": dict(provenance)}), "provenance")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`provenance` is not JSON: {error}") from error
    parts = []
    for name, value in state.items():
        encoded = encoder.encode(name, state_of(value))
        tree = strict_json.dumps(encoded.tree, sort_keys=False)
        if len(tree) > MAX_JSON_BYTES:
            raise ValueError(
                f"state {name!r} is {len(tree) / 1e6:.1f} MB of JSON, more than the "
                f"{MAX_JSON_BYTES / 1e6:.1f} MB that can be read again; "
                "store long lists as tensors or arrays"
            )
        parts.append(Part(name, tree, encoded.tensors))

    watch = encoder.watch

    def finite() -> bool:
        return watch is None or watch.finite

    return SaveRequest(
        step,
        parts,
        healthy,
        finite,
        numbers,
        dict(provenance),
        alive,
        shard_bytes,
        finite_only=finite_only,
    )


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    check_mapping("metrics", metrics)
    numbers = {}
    for key, value in metrics.items():
        try:
            numbers[str(key)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"`metrics[{key!r}]` must be a number, not {value!r:.80}") from None
    return numbers


def check_mapping(argument: str, value: object) -> None:
    """ValueError for a module or a list where names and what they mean are expected."""
    if not isinstance(value, Mapping):
        raise ValueError(
            f"`{argument}` must be a mapping of names, such as {{'model': …}}, "
            f"not a `{type(value).__qualname__}`"
        )


def check_step(step: object) -> int:
    """ValueError unless a checkpoint can be named after it."""
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise ValueError(f"`step` must be an integer from 0 to {MAX_STEP}, not {step!r}")
    return step


def _check(step: int, state: Mapping[str, object]) -> None:
    check_step(step)
    check_mapping("state", state)
    if not state:
        raise ValueError("`state` is empty; give at least one name")
    names = [check_state_name(name) for name in state]
    if len({name.lower() for name in names}) != len(names):
        raise ValueError("two names of `state` differ only in case")
    for name in names:
        stem = _SHARD_NAME.fullmatch(name)
        if stem and stem[1] in state:
            raise ValueError(
                f"state names {name!r} and {stem[1]!r} could use the same file; rename one"
            )


def state_of(value: object) -> object:
    """What of `value` is stored: its state_dict() where it has one."""
    value = unwrapped(value)
    state_dict = getattr(value, "state_dict", None)
    return state_dict() if callable(state_dict) else value
