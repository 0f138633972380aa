"""Schedules as pure functions: 0-based step → the multiplier used by that step.

All are closed-form, so a resume at any step gives the same value. Warm-up is `(step+1)/warmup`:
never 0 at step 0, and 1 at step `warmup_steps - 1`.
"""

from __future__ import annotations

import math

DECAY_SHAPES: tuple[str, ...] = ("linear", "1-sqrt", "cosine", "exponential", "power")


def constant(step: int, *, warmup_steps: int = 0) -> float:
    """Warm-up, then 1."""
    _check_step(step, warmup_steps)
    return _warmup(step, warmup_steps)


def cosine(step: int, *, total_steps: int, warmup_steps: int = 0, final: float = 0.1) -> float:
    """Warm-up, then half a cosine from 1 to `final`, which step `total_steps` would use."""
    _check_horizon(step, total_steps, warmup_steps, final)
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    x = _progress(step, warmup_steps, total_steps)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * x))


def linear_to_zero(
    step: int, *, total_steps: int, warmup_steps: int = 0, final: float = 0.0
) -> float:
    """Warm-up, then a straight line to `final` (D2Z, arXiv 2502.15938): best at a fixed budget."""
    _check_horizon(step, total_steps, warmup_steps, final)
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return 1.0 - (1.0 - final) * _progress(step, warmup_steps, total_steps)


def wsd(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int,
    shape: str = "linear",
    final: float = 0.0,
    power: float = 1.2,
) -> float:
    """Warm-up, stable at 1, then `decay_steps` of decay to `final` (MiniCPM, arXiv 2404.06395).

    `shape`: "linear"; "1-sqrt" (arXiv 2405.18392); "cosine"; "exponential" (geometric; `final` = 0
    is taken as 1e-3 of the peak and ends there); "power", `(1-x)^power`, `power` above 0. Past the
    end it stays at `final`.

    Raises:
        ValueError: phases that do not fit into `total_steps`, an unknown `shape`, or a `power` that
            is not above 0.
    """
    _check_horizon(step, total_steps, warmup_steps, final)
    if decay_steps < 0 or warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"`warmup_steps` {warmup_steps!r} + `decay_steps` {decay_steps!r} "
            f"do not fit into `total_steps` {total_steps!r}"
        )
    if shape not in DECAY_SHAPES:
        raise ValueError(
            f"`shape` {shape!r} is unknown; use one of {', '.join(map(repr, DECAY_SHAPES))}"
        )
    if not power > 0.0:
        raise ValueError(f"`power` must be above 0, got {power!r}")
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    start = total_steps - decay_steps
    if step < start:
        return 1.0
    x = _progress(step, start, total_steps)
    if shape == "exponential":
        return math.pow(final or 1e-3, x)
    fall = {
        "linear": 1.0 - x,
        "1-sqrt": 1.0 - math.sqrt(x),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * x)),
        "power": math.pow(1.0 - x, power),
    }[shape]
    return final + (1.0 - final) * fall


def momentum_warmup(
    step: int,
    *,
    warmup_steps: int,
    start: float = 0.85,
    peak: float = 0.95,
    total_steps: int | None = None,
    cooldown_steps: int = 0,
) -> float:
    """Momentum itself, not a multiplier: a line from `start` to `peak` over `warmup_steps`.

    With `total_steps`, the last `cooldown_steps` return to `start` (the modded-nanogpt recipe).
    """
    _check_step(step, warmup_steps)
    rise = min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0
    fall = 0.0
    if total_steps is not None and cooldown_steps > 0:
        fall = min(1.0, max(0.0, (step - (total_steps - cooldown_steps)) / cooldown_steps))
    return start + (peak - start) * rise * (1.0 - fall)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def _progress(step: int, start: int, end: int) -> float:
    return min(1.0, (step - start) / (end - start)) if end > start else 1.0


def _check_step(step: int, warmup_steps: int = 0) -> None:
    if step < 0:
        raise ValueError(f"`step` must be at least 0, got {step!r}")
    if warmup_steps < 0:
        raise ValueError(f"`warmup_steps` must be at least 0, got {warmup_steps!r}")


def _check_horizon(step: int, total_steps: int, warmup_steps: int, final: float) -> None:
    _check_step(step)
    if total_steps < 1:
        raise ValueError(f"`total_steps` must be at least 1, got {total_steps!r}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"`warmup_steps` must lie between 0 and `total_steps` {total_steps!r}, "
            f"got {warmup_steps!r}"
        )
    if not 0.0 <= final <= 1.0:
        raise ValueError(f"`final` must lie in [0, 1], got {final!r}")
