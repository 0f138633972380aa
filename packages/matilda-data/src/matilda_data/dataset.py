"""Opening a data set: `open_dataset`."""

from __future__ import annotations

import os

from matilda_data.manifest import Manifest

__all__ = ["TokenDataset", "open_dataset"]


class TokenDataset:
    """One split of a data set. Attributes as below."""

    data_id: str
    split: str
    tokenizer_name: str
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int
    n_tokens: int
    n_documents: int
    manifest: Manifest


def open_dataset(data_dir: str | os.PathLike[str], split: str = "train") -> TokenDataset:
    """Open one split of the data set in `data_dir`."""
    raise NotImplementedError
