"""A tokenizer as the files that Hugging Face transformers loads."""

from __future__ import annotations

import json

from matilda_data.fast import tokenizer_json
from matilda_data.tokenizer import Tokenizer

__all__ = ["END_OF_TEXT", "transformers_files"]

END_OF_TEXT = "<|endoftext|>"


def transformers_files(tokenizer: Tokenizer, *, max_length: int | None = None) -> dict[str, str]:
    """`tokenizer.json` and `tokenizer_config.json` by name, for `AutoTokenizer`.

    The ids are those of `tokenizer`; its end-of-text is `<|endoftext|>`, begin and end of a
    document alike, and is added to no text by itself. `max_length` is the model's longest sequence,
    tokens.
    """
    ranks, splits = tokenizer.merges()
    description = json.loads(tokenizer_json(ranks, splits))
    end = {
        "id": tokenizer.eot_id,
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    description["added_tokens"] = [end]
    description["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    if not tokenizer.pattern:  # bytes: nothing is split, nothing merged
        description["pre_tokenizer"]["use_regex"] = False
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    return {
        "tokenizer.json": json.dumps(description, ensure_ascii=False, separators=(",", ":")),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
