"""Names of the systems of `time_to_loss.py`: `NAME`, `NAME@TOKENS` or `NAME@TOKENSxFACTOR`."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Recipe", "parse_system"]


@dataclass(frozen=True)
class Recipe:
    """What of a recipe is not its script's or its config's."""

    tokens_per_step: int | None = None
    """Tokens of a batch; None: as there."""
    rate: float = 1.0
    """Factor on every learning rate."""


def parse_system(system: str) -> tuple[str, Recipe]:
    """A system's name and recipe.

    Raises `ValueError` where what follows the `@` is neither tokens nor tokens and a factor.
    """
    name, at, text = system.partition("@")
    found = re.fullmatch(r"(\d+)(?:x(\d+(?:\.\d+)?))?", text)
    if at and (found is None or int(found[1]) == 0 or float(found[2] or 1) == 0):
        raise ValueError(f"{system!r} is no system; give {name}@TOKENS or {name}@TOKENSxFACTOR.")
    return name, Recipe(int(found[1]), float(found[2] or 1)) if found else Recipe()
