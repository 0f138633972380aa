"""What this package raises beside `ValueError`, apart from torch's seconds-long import."""


class KernelMismatchError(RuntimeError):
    """A chosen kernel disagrees with float32 arithmetic."""
