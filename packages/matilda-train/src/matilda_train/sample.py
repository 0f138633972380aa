"""Text sampled from a model, for the end of a run and for `apps/generate.py`."""

from __future__ import annotations

import torch

from matilda_data import Tokenizer, load_tokenizer
from matilda_model import Transformer, generate
from matilda_train.config import RunConfig

__all__ = ["complete_text", "sample_text"]


def sample_text(model: Transformer, config: RunConfig) -> str:
    """The sample that closes a run: `eval.sample_tokens` after `eval.sample_prompt`.

    Seeded with `train.seed`, so it is a function of the weights.
    """
    if config.eval.sample_tokens == 0:
        return ""
    return complete_text(
        model,
        load_tokenizer(config.data.tokenizer),
        config.eval.sample_prompt,
        max_new_tokens=config.eval.sample_tokens,
        temperature=0.6,
        seed=config.train.seed,
    )


def complete_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """`prompt` and what the model makes of it, up to the end of the document.

    Draws from a generator of its own, seeded with `seed`, on the model's device. Raises
    `ValueError` when the prompt leaves no room in the model's longest sequence.
    """
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt).tolist()]
    room = model.config.max_seq_len - len(ids)
    if room < 1:
        raise ValueError(
            f"The prompt is {len(ids)} tokens long, but the model's longest sequence is "
            f"{model.config.max_seq_len} (`model.max_seq_len`); shorten the prompt."
        )
    new_ids = generate(
        model,
        ids,
        max_new_tokens=min(max_new_tokens, room),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=(tokenizer.eot_id,),
        vocab_limit=tokenizer.vocab_size,
        generator=torch.Generator(device=model.embed.weight.device).manual_seed(seed),
    )
    return prompt + tokenizer.decode(new_ids)
