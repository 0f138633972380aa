"""How fields are checked: in one sentence that names the field."""

from __future__ import annotations

from matilda_train.duration import Duration

__all__ = ["interval", "interval_of", "require"]


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """`ValueError` unless `condition` holds of the field `name`."""
    if not condition:
        raise ValueError(f"`{name}` is {value!r}, but must be {expected}.")


def interval(every: int | str, name: str) -> Duration:
    """A duration above 0; `ValueError` naming the field."""
    try:
        parsed = Duration.parse(every)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None
    require(parsed.amount > 0, name, every, "above 0")
    return parsed


def interval_of(every: int | str | None, every_steps: int, section: str) -> Duration:
    """A section's `every` where it is given, else its `every_steps`."""
    if every is not None:
        return interval(every, f"{section}.every")
    require(every_steps >= 1, f"{section}.every_steps", every_steps, "1 or more")
    return Duration(every_steps, "steps")
