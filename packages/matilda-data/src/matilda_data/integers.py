"""Integers from callers, also numpy's and torch's, as Python's: those go into JSON and hashes."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from matilda_data.errors import DataError

__all__ = ["plain_integer"]


def plain_integer(name: str, value: object, least: int | None = None) -> int:
    """`value` as an `int`; DataError naming the argument when it is none or below `least`."""
    number: int | None = None
    if isinstance(value, SupportsIndex):
        try:
            number = operator.index(value)
        except TypeError:  # a torch tensor of floats
            number = None
    if number is None or (least is not None and number < least):
        wanted = "" if least is None else f" ≥ {least}"
        raise DataError(f"`{name}` is {value!r}; give an integer{wanted}")
    return number
