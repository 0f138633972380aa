"""Text to verified uint16 token shards, and resumable, elastic streams over them."""

__all__: list[str] = []
