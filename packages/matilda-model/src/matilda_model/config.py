"""The one description of a model: validated where it is defined."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

ATTENTION_BACKENDS = ("auto", "cudnn", "flash", "fa4", "fa4_joint", "flex", "math")
LOSS_BACKENDS = ("auto", "fused", "fused_quack", "fused_fp8", "plain", "chunked", "liger")
MATMUL_BACKENDS = ("auto", "fused", "quack", "quack_residual", "quack_all", "plain")
NORM_BACKENDS = ("auto", "folded", "fused", "plain")
MLP_KINDS = ("swiglu", "relu2")
GATE_CHANNELS = 32  # of the residual stream, read by the gate of a value embedding


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape, numerics and kernel choices of a `Transformer`.

    The defaults are the 114M model (`configs/base_124m.json`). A wrong value raises `ValueError`
    when the config is made, never later.
    """

    vocab_size: int = 50304
    """Rows of the embedding. Pad the tokenizer's size to a multiple of 64 or 128: GEMMs like it."""

    d_model: int = 768
    """Width of the residual stream."""

    n_layers: int = 12
    """Number of blocks (attention + MLP)."""

    n_heads: int = 12
    """Query heads."""

    n_kv_heads: int = 4
    """Key/value heads: `n_heads` for multi-head, 1 for multi-query, between for grouped-query."""

    head_dim: int | None = None
    """Width of a head, even. None: `d_model // n_heads`."""

    max_seq_len: int = 1024
    """Longest sequence, tokens: the size of the RoPE table and the limit of generation."""

    mlp: str = "swiglu"
    """`"swiglu"` (three matrices; Shazeer 2020) or `"relu2"` (two; So et al. 2021)."""

    mlp_ratio: float = 8 / 3
    """Hidden width over `d_model` when `d_ff` is None; 4.0 is usual for `"relu2"`."""

    d_ff: int | None = None
    """Hidden width of the MLP. None: `round(mlp_ratio * d_model)`."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies (Su et al. 2021)."""

    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""

    qk_norm: bool = True
    """RMSNorm of every query and key head, with a learned weight of `head_dim` (Qwen3's form)."""

    tie_embeddings: bool = True
    """One matrix for the embedding and the output head."""

    logit_softcap: float | None = None
    """Logits become `cap * tanh(logits / cap)` (Gemma 2). None: off."""

    z_loss: float = 0.0
    """Coefficient of `logsumexp(logits)**2`, added to the cross-entropy of each token (PaLM)."""

    init_std: float = 0.02
    """Standard deviation of hidden matrices; those that write to the residual stream get
    `init_std / sqrt(2 * n_layers)` (GPT-2)."""

    embed_init_std: float | None = None
    """Standard deviation of the embedding and the head. None: `0.2 / sqrt(d_model)`, which starts
    the loss within 1 % of ln(vocab_size) at every width."""

    window: int | None = None
    """Tokens, itself included, that a query sees in the `S` layers of `window_pattern`."""

    window_pattern: str = "L"
    """`L` (full context) and `S` (`window`), repeated over the layers; the last layer is full."""

    document_token: int | None = None
    """Id that begins every document of a packed row: with it no token attends to another document.
    None: a row is one text."""

    zero_init_outputs: bool = False
    """Start every matrix that writes to the residual stream at zero (each block at identity)."""

    logit_scale: float = 1.0
    """Factor on the logits before the soft-cap; below 1 is a softer start (muP uses 1 / width)."""

    residual_scalars: bool = False
    """Learned scalars before each block: `x = r * x + e * embedding`, from r = 1 and e = 0
    (modded-nanogpt's x0 and residual lambdas)."""

    value_embeddings: bool = False
    """Every second layer, the last one included, adds a gated embedding of the token to its values
    (modded-nanogpt, nanochat): many parameters, almost no FLOPs; `n_params` counts them."""

    attention: str = "auto"
    """Attention back end: `"auto"` (fastest measured for the device), `"cudnn"`, `"flash"`,
    `"flex"`, `"math"` (all torch's), `"fa4"` (FlashAttention-4, the `hopper` extra), `"fa4_joint"`
    (the same in one with QK-norm and RoPE, where shape and version allow). Layers with a window and
    `document_token` need `"auto"`, `"flex"` (compiled) or `"math"`."""

    loss: str = "auto"
    """Loss back end: `"auto"` (fastest measured for the device), `"fused"`, `"fused_quack"`,
    `"fused_fp8"`, `"plain"`, `"chunked"`, `"liger"`. See `linear_cross_entropy`."""

    matmul: str = "auto"
    """MLP matmuls of `"relu2"`: `"fused"` puts the activation into the matmul kernels (Triton,
    bf16, Hopper or later), `"quack"` does so with quack-kernels (Hopper, the `hopper` extra),
    `"quack_residual"` adds the residual stream in the output products of attention and MLP as well,
    `"quack_all"` computes all products of the blocks but weights' gradients, `"plain"` leaves it to
    torch, `"auto"` takes quack_all, else fused, where they run."""

    norm: str = "auto"
    """Norms: `"fused"` is one Triton pass for QK-norm and RoPE over the joint q, k, v product, and
    one for a block's norm and the residual stream backward (CUDA), `"folded"` makes a block's norms
    parts of the products around them where attention is `"fa4_joint"` and the MLP `"relu2"` by
    `"quack_all"`, `"plain"` leaves them to torch, `"auto"` folds, else fuses, where they run."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"):
            _check_positive_int(name, getattr(self, name))
        for name in ("head_dim", "d_ff", "window"):
            if getattr(self, name) is not None:
                _check_positive_int(name, getattr(self, name))
        for name in ("mlp_ratio", "rope_theta", "norm_eps", "init_std", "logit_scale"):
            _check_number(name, getattr(self, name), low=0.0, open_low=True)
        _check_number("z_loss", self.z_loss, low=0.0)
        for name in ("logit_softcap", "embed_init_std"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), low=0.0, open_low=True)
        for name in (
            "qk_norm",
            "tie_embeddings",
            "zero_init_outputs",
            "residual_scalars",
            "value_embeddings",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, not {getattr(self, name)!r}")
        _check_choice("mlp", self.mlp, MLP_KINDS)
        _check_choice("attention", self.attention, ATTENTION_BACKENDS)
        _check_choice("loss", self.loss, LOSS_BACKENDS)
        _check_choice("norm", self.norm, NORM_BACKENDS)
        _check_choice("matmul", self.matmul, MATMUL_BACKENDS)
        pattern = self.window_pattern
        if not isinstance(pattern, str) or not pattern or set(pattern) - set("LS"):
            raise ValueError(
                f"`window_pattern` must be made of L and S, such as 'SSSL', not "
                f"{self.window_pattern!r}"
            )
        if "S" in self.window_pattern and self.window is None:
            raise ValueError(
                f"`window_pattern` {self.window_pattern!r} has S layers: set `window`, in tokens"
            )
        if "S" not in self.window_pattern and self.window is not None:
            raise ValueError(
                f"`window` {self.window!r} is of no layer: give `window_pattern` S layers, such as "
                "'SSSL'"
            )
        if "S" in self.window_pattern and self.attention in ("cudnn", "flash", "fa4", "fa4_joint"):
            raise ValueError(
                f"`attention` {self.attention!r} has no window: choose 'auto', 'flex' or 'math'"
            )
        token = self.document_token
        if token is not None:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ValueError(f"`document_token` must be a token id, not {token!r}")
            if token >= self.vocab_size:
                raise ValueError(
                    f"`document_token` {token!r} is no row of the vocabulary: choose one under "
                    f"`vocab_size` {self.vocab_size!r}"
                )
            if self.attention in ("cudnn", "flash", "fa4", "fa4_joint"):
                raise ValueError(
                    f"`attention` {self.attention!r} has no document mask: choose 'auto', 'flex' "
                    "or 'math'"
                )
        if self.resolved_d_ff < 1:
            raise ValueError(
                f"`mlp_ratio` {self.mlp_ratio!r} of `d_model` {self.d_model!r} leaves the MLP no "
                "hidden unit: choose a larger one or set `d_ff`"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"`n_heads` {self.n_heads!r} is not a multiple of `n_kv_heads` "
                f"{self.n_kv_heads!r}: each key/value head serves a whole group of query heads"
            )
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"`d_model` {self.d_model!r} is not a multiple of `n_heads` {self.n_heads!r}: "
                "change one of them or set `head_dim`"
            )
        if self.resolved_head_dim % 2:
            raise ValueError(
                f"the head dimension {self.resolved_head_dim!r} is odd: RoPE rotates pairs, "
                "set an even `head_dim`"
            )

    @property
    def resolved_head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def resolved_d_ff(self) -> int:
        """Hidden width of the MLP."""
        return round(self.mlp_ratio * self.d_model) if self.d_ff is None else self.d_ff

    @property
    def resolved_embed_init_std(self) -> float:
        """Standard deviation of the embedding's initial values."""
        if self.embed_init_std is not None:
            return self.embed_init_std
        return 0.2 / math.sqrt(self.d_model)

    def layer_window(self, layer: int) -> int | None:
        """The window of block `layer`, None for full context."""
        kind = self.window_pattern[layer % len(self.window_pattern)]
        return self.window if kind == "S" and layer != self.n_layers - 1 else None

    def has_value_embedding(self, layer: int) -> bool:
        """Whether block `layer` adds a value embedding."""
        return self.value_embeddings and layer % 2 == (self.n_layers - 1) % 2

    @property
    def n_params(self) -> int:
        """Number of trainable parameters; a tied matrix counts once."""
        from matilda_model.flops import count_params

        return count_params(self)


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, not {value!r}")


def _check_number(name: str, value: object, *, low: float, open_low: bool = False) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (ok and low <= value < float("inf")) or (open_low and value == low):  # type: ignore[operator]
        bound = f"greater than {low:g}" if open_low else f"at least {low:g}"
        raise ValueError(f"`{name}` must be a finite number {bound}, not {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, not {value!r}{hint}")
