"""`Duration`: how long or how often, in steps, tokens or seconds, as people write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

__all__ = ["Duration", "parse_count"]

Unit = Literal["steps", "tokens", "seconds"]

_UNITS: dict[str, tuple[Unit, int]] = {
    **dict.fromkeys(("step", "steps"), ("steps", 1)),
    **dict.fromkeys(("token", "tokens"), ("tokens", 1)),
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1)),
    **dict.fromkeys(("min", "minute", "minutes"), ("seconds", 60)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600)),
    **dict.fromkeys(("d", "day", "days"), ("seconds", 86400)),
}
_SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_NUMBER = r"\d[\d_,]*(?:\.\d+)?(?:[eE][+-]?\d{1,3})?"
_COUNT = re.compile(rf"({_NUMBER}) ?([kKMBT]?)")
_DURATION = re.compile(rf"({_NUMBER}) ?([kKMBT]?) ?([a-z]+)")
_LARGEST = 10**18


@dataclass(frozen=True)
class Duration:
    """An amount of training: `Duration.parse("10M tokens")`, `Duration(250, "steps")`.

    Steps and tokens are functions of the cursor and may decide anything; seconds depend on the
    machine and may decide only what changes no weight.
    """

    amount: int | float
    """0 or more; a whole number for steps and tokens."""

    unit: Unit

    def __post_init__(self) -> None:
        whole = self.unit == "seconds" or isinstance(self.amount, int)
        if not whole or not 0 <= self.amount <= _LARGEST:
            raise ValueError(
                f"{self.amount!r} {self.unit} is no duration; give 0 or more, and whole steps and "
                "tokens."
            )

    @classmethod
    def parse(cls, text: str | int) -> Duration:
        """From "250 steps", "10M tokens", "10e6 tokens", "15 min", "1.5 h"; a bare number is steps.

        Suffixes k, M, B and T are powers of a thousand. Raises `ValueError` for anything else.
        """
        if isinstance(text, int) or text.strip().isdecimal():
            return cls(int(text), "steps")
        match = _DURATION.fullmatch(text.strip())
        if match is None or match[3] not in _UNITS:
            raise ValueError(
                f"{text!r} is no duration; write a number with steps, tokens, s, min, h or d, as "
                'in "250 steps", "10M tokens" or "15 min".'
            )
        unit, scale = _UNITS[match[3]]
        amount = _exact(match[1], match[2]) * scale
        if amount > _LARGEST or (unit != "seconds" and amount != amount.to_integral_value()):
            whole = "" if unit == "seconds" else "whole "
            raise ValueError(f"{text!r} is no {whole}number of {unit} up to 10^18; write one.")
        return cls(float(amount) if unit == "seconds" else int(amount), unit)

    def __str__(self) -> str:
        """The shortest form that `parse` reads back to the same value."""
        amount, unit = self.amount, str(self.unit)
        if unit == "seconds":
            for short, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
                if amount and amount % seconds == 0:
                    return f"{int(amount) // seconds} {short}"
            return f"{int(amount) if amount == int(amount) else amount!r} s"
        if unit == "tokens":
            for suffix in ("T", "B", "M"):
                if amount and amount % _SUFFIXES[suffix] == 0:
                    return f"{int(amount) // _SUFFIXES[suffix]}{suffix} tokens"
        return f"{amount} {unit.removesuffix('s') if amount == 1 else unit}"


def parse_count(text: str) -> int:
    """A whole number such as "1048576", "1_048_576" or "1M"; `ValueError` for anything else."""
    match = _COUNT.fullmatch(text.strip())
    if match is not None:
        amount = _exact(match[1], match[2])
        if amount <= _LARGEST and amount == amount.to_integral_value():
            return int(amount)
    raise ValueError(f"{text!r} is no whole number up to 10^18; write one, as in 1048576.")


def _exact(number: str, suffix: str) -> Decimal:
    return Decimal(number.replace("_", "").replace(",", "")) * _SUFFIXES[suffix]
