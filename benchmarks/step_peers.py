"""A training step of each public peer, built by its own code at a given shape."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def peer_step(
    peer: str, shape: Any, folder: Path, accumulate: int, adamw: Callable[[Any], Any]
) -> Callable[[Iterator[tuple[Any, Any]]], Any]:
    """A step takes `accumulate` micro-batches, inputs and targets [B, T], from its argument."""
    import torch

    loss: Callable[[Any, Any], Any]
    if peer == "nanoGPT":
        with _import_path(folder / "nanoGPT"):
            import model as nanogpt  # type: ignore[import-not-found]
        gpt = nanogpt.GPT(
            nanogpt.GPTConfig(
                block_size=shape.max_seq_len, vocab_size=shape.vocab_size, n_layer=shape.n_layers,
                n_head=shape.n_heads, n_embd=shape.d_model, dropout=0.0, bias=False,
            )
        )  # fmt: skip
        optimizer = gpt.configure_optimizers(0.1, 6e-4, (0.9, 0.95), _device_type())
        compiled = _compile(gpt)

        def loss(x: Any, y: Any) -> Any:
            with torch.autocast(_device_type(), torch.bfloat16):
                return compiled(x, y)[1]

    elif peer == "nanochat":
        with _import_path(folder / "nanochat"):
            from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]
        with torch.device("meta"):
            gpt = GPT(
                GPTConfig(
                    sequence_len=shape.max_seq_len, vocab_size=shape.vocab_size,
                    n_layer=shape.n_layers, n_head=shape.n_heads, n_kv_head=shape.n_kv_heads,
                    n_embd=shape.d_model, window_pattern="L",
                )
            )  # fmt: skip
        gpt.to_empty(device=_device_type())
        gpt.init_weights()
        optimizer = gpt.setup_optimizer()
        loss = _compile(gpt)
    else:
        from transformers import Qwen3Config, Qwen3ForCausalLM  # type: ignore[import-not-found]

        gpt = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=2048,
                num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
                num_key_value_heads=shape.n_kv_heads, head_dim=shape.resolved_head_dim,
                max_position_embeddings=shape.max_seq_len, tie_word_embeddings=True,
                use_cache=False, attn_implementation="sdpa",
            )
        ).float()  # fmt: skip
        optimizer = adamw(gpt)

        def qwen_loss(x: Any, y: Any) -> Any:
            with torch.autocast(_device_type(), torch.bfloat16):
                logits = gpt(input_ids=x).logits
                return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

        loss = _compile(qwen_loss)

    def step(batches: Iterator[tuple[Any, Any]]) -> Any:
        for _ in range(accumulate):
            value = loss(*next(batches)) / accumulate
            value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach() * accumulate

    return step


def _compile(model: Any) -> Any:
    import torch

    return torch.compile(model, dynamic=False) if torch.cuda.is_available() else model


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
