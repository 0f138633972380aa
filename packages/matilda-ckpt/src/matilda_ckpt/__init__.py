"""Atomic, verified, crash-safe checkpoints with bit-for-bit resume."""

__all__: list[str] = []
