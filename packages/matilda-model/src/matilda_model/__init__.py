"""Decoder-only transformers for small language models, in plain PyTorch."""

__all__: list[str] = []
