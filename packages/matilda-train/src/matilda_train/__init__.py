"""The training loop of Matilda: one config in, one verifiable run out."""

__all__: list[str] = []
