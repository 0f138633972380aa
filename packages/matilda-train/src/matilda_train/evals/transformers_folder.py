"""A folder of Hugging Face transformers (a model of ours exported, or any other) to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["FolderCoder", "ScoredFolder", "load_folder"]

GPU_BATCH_TOKENS = 8_192  # all logits of a batch exist at once: 1.6 GB in float32 at 50,304 ids


class ScoredFolder:
    """A causal language model of transformers; `hidden` are its logits already."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = model.device
        config = model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        self.max_seq_len = int(
            getattr(config, "max_position_embeddings", None)
            or getattr(config, "n_positions", None)
            or 2048
        )

    def hidden(self, ids_BT: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits

    def logits(self, h_ND: Tensor) -> Tensor:
        return h_ND.float()


class FolderCoder:
    """The folder's tokenizer; nothing is added to a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
        self.eot_id = int(end)
        self.vocab_size = len(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text


def load_folder(
    folder: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> tuple[ScoredFolder, FolderCoder]:
    """Model and tokenizer of a local folder.

    Raises `ValueError` when there is none, when transformers is not installed and when the folder
    brings code of its own, as exports of ReLU² models do, without `trust_remote_code`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is no transformers folder: it holds no `config.json`.")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ValueError(
            "`--hf` needs transformers, which is not installed; add it with `uv run --extra eval "
            "…` or `pip install 'matilda-train[eval]'`."
        ) from None
    if not trust_remote_code and "auto_map" in (folder / "config.json").read_text(encoding="utf-8"):
        raise ValueError(
            f"{str(folder)!r} brings its own model code; look at it, then add "
            "`--trust-remote-code`."
        )
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return ScoredFolder(model.to(device).eval()), FolderCoder(tokenizer)
