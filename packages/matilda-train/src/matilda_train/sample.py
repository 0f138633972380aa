"""Text sampled from a model, for the end of a run and for `apps/generate.py`."""

from __future__ import annotations

import torch

from matilda_data import Tokenizer, load_tokenizer
from matilda_model import Transformer, generate
from matilda_train.config import RunConfig

__all__ = ["check_sample_prompt", "complete_text", "encode_prompt", "sample_text"]


def check_sample_prompt(config: RunConfig) -> None:
    """Raise `ValueError` for an `eval.sample_prompt` that the run could not end with."""
    if config.eval.sample_tokens > 0:
        tokenizer = load_tokenizer(config.data.tokenizer)
        try:
            encode_prompt(tokenizer, config.eval.sample_prompt, config.model.max_seq_len)
        except ValueError as error:
            raise ValueError(f"`eval.sample_prompt`: {error}") from None


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
    ids = encode_prompt(tokenizer, prompt, model.config.max_seq_len)
    new_ids = generate(
        model,
        ids,
        max_new_tokens=min(max_new_tokens, model.config.max_seq_len - len(ids)),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=(tokenizer.eot_id,),
        vocab_limit=tokenizer.vocab_size,
        generator=torch.Generator(device=model.embed.weight.device).manual_seed(seed),
    )
    return prompt + tokenizer.decode(new_ids)


def encode_prompt(tokenizer: Tokenizer, prompt: str, longest: int) -> list[int]:
    """Token ids of a document that begins with `prompt`, fewer than `longest`, or `ValueError`."""
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt).tolist()]
    if len(ids) >= longest:
        raise ValueError(
            f"The prompt is {len(ids)} tokens long, but the model's longest sequence is {longest} "
            "(`model.max_seq_len`); shorten it."
        )
    return ids
