"""The one exception type of this package."""

from __future__ import annotations

__all__ = ["DataError"]


class DataError(ValueError):
    """A data set, an input or an argument cannot be used; the message is one sentence with the fix.

    It is a `ValueError`, so programs that print user mistakes in one line need no special case.
    """
