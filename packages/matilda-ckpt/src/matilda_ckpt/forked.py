"""What a forked child (a data worker, say) must do with what its parent had under way.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable


def call_in_forked_child(method: Callable[[], None]) -> None:
    """Have a bound method called in every process forked from this one, while its object lives."""
    if not hasattr(os, "register_at_fork"):
        return
    reference = weakref.WeakMethod(method)

    def call_if_alive() -> None:
        alive = reference()
        if alive is not None:
            alive()

    os.register_at_fork(after_in_child=call_if_alive)
