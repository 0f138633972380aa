"""What the loop carries from step to step, and what it returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

__all__ = ["LoopState", "TrainResult"]


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    status: Literal["finished", "already_finished", "preempted"]
    run_dir: Path
    step: int
    first_bits_per_byte: float | None = None
    """Held out, of a run that has finished now; None also where it was not finite."""
    final_bits_per_byte: float | None = None
    sample: str | None = None


@dataclass
class LoopState:
    """What the loop carries from step to step besides weights, optimizer and stream."""

    step: int = 0
    batch_hash: str = "0" * 64

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for field in fields(self):
            setattr(self, field.name, state[field.name])
