"""Parameter and FLOP counts from the config alone, exact for every option.

Shape suffixes: T sequence, D model, H query heads, K key/value heads, E head dim, F feed-forward,
V vocabulary, L layers.
"""

from __future__ import annotations

from matilda_model.config import GATE_CHANNELS, ModelConfig


def count_matmul_params(config: ModelConfig) -> int:
    """Weights that take part in a matrix product: every linear layer and the output head.

    A tied embedding counts once, as the head; an untied embedding is a lookup and counts zero.
    """
    d, e = config.d_model, config.resolved_head_dim
    attention = d * e * (2 * config.n_heads + 2 * config.n_kv_heads)
    mlp = (3 if config.mlp == "swiglu" else 2) * d * config.resolved_d_ff
    gates = _value_layers(config) * config.n_kv_heads * min(GATE_CHANNELS, d)
    return config.n_layers * (attention + mlp) + gates + config.vocab_size * d


def count_params(config: ModelConfig) -> int:
    """Trainable parameters of `Transformer(config)`; a tied matrix counts once."""
    d = config.d_model
    norms = config.n_layers * (2 * d + (2 * config.resolved_head_dim if config.qk_norm else 0)) + d
    untied = 0 if config.tie_embeddings else config.vocab_size * d
    width = config.n_kv_heads * config.resolved_head_dim
    values = _value_layers(config) * config.vocab_size * width
    scalars = 2 * config.n_layers if config.residual_scalars else 0
    return count_matmul_params(config) + norms + untied + values + scalars


def _value_layers(config: ModelConfig) -> int:
    return sum(config.has_value_embedding(layer) for layer in range(config.n_layers))


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool) -> int:
    """Floating-point operations of one forward and backward pass, per token.

    PaLM's convention (Chowdhery et al. 2022, appendix B): 6 per matmul weight (tied head included)
    plus `12 * n_layers * n_heads * head_dim * seq_len` for attention scores and values.
    `causal=True` halves the attention term: half of the square is masked and need not be computed.
    A layer with a window counts the window in place of `seq_len`, and, causal, what of it lies
    inside the sequence; document boundaries, which only the data know, are not taken off.
    Recomputation (flash attention's backward) is never counted.

    Raises ValueError when `seq_len` is not positive.
    """
    if seq_len < 1:
        raise ValueError(f"`seq_len` must be a positive integer, not {seq_len!r}")
    width = config.n_heads * config.resolved_head_dim
    keys_twice = 0  # seen by a sequence's tokens in all layers
    for layer in range(config.n_layers):
        window = min(config.layer_window(layer) or seq_len, seq_len)
        # a full layer: seq_len keys, or seq_len / 2 when causal; both from one formula
        keys_twice += window * (2 * seq_len - window) if causal else 2 * window * seq_len
    return 6 * count_matmul_params(config) + 6 * width * keys_twice // seq_len
