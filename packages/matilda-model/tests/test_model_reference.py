"""The model against an independent float64 implementation written from the textbook formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from matilda_model import ModelConfig, Transformer

TINY = ModelConfig(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32, mlp_ratio=2.0
)


def randomised(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model none of whose parameters is special: norm weights differ from one."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def reference_logits(model: Transformer, ids: Tensor) -> Tensor:
    """Loops over heads and positions; nothing is shared with the package but the weights."""
    c = model.config
    w = {name: value.detach().double() for name, value in model.named_parameters()}
    head_dim = c.head_dim or c.d_model // c.n_heads

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.norm_eps) * weight

    def rotate(x: Tensor) -> Tensor:  # [T, E] as complex numbers times exp(i * position * freq)
        half = head_dim // 2
        z = torch.complex(x[:, :half], x[:, half:])
        freq = torch.tensor(
            [c.rope_theta ** (-2 * i / head_dim) for i in range(half)], dtype=torch.float64
        )
        turn = torch.arange(len(x), dtype=torch.float64)[:, None] * freq
        z = z * torch.polar(torch.ones_like(turn), turn)
        return torch.cat((z.real, z.imag), dim=-1)

    rows = []
    for row in ids:
        x = w["embed.weight"][row]
        x0 = x
        for i in range(c.n_layers):
            p = f"blocks.{i}."
            if c.residual_scalars:
                x = w["residual_scale"][i] * x + w["embed_scale"][i] * x0
            short = c.window_pattern[i % len(c.window_pattern)] == "S" and i < c.n_layers - 1
            window = c.window if short else None
            h = rms(x, w[p + "attn_norm.weight"])
            heads = []
            for head in range(c.n_heads):
                kv = head // (c.n_heads // c.n_kv_heads)
                q = h @ w[p + "attn.q.weight"][head * head_dim : (head + 1) * head_dim].T
                k = h @ w[p + "attn.k.weight"][kv * head_dim : (kv + 1) * head_dim].T
                v = h @ w[p + "attn.v.weight"][kv * head_dim : (kv + 1) * head_dim].T
                if p + "attn.value_embed.weight" in w:
                    at = slice(kv * head_dim, (kv + 1) * head_dim)
                    gate = 2 / (1 + torch.exp(-h[:, :32] @ w[p + "attn.value_gate.weight"][kv]))
                    v = v + gate[:, None] * w[p + "attn.value_embed.weight"][row, at]
                if c.qk_norm:
                    q = rms(q, w[p + "attn.q_norm.weight"])
                    k = rms(k, w[p + "attn.k_norm.weight"])
                q, k = rotate(q), rotate(k)
                out = torch.zeros_like(q)
                for t in range(len(row)):
                    first = 0 if window is None else max(0, t + 1 - window)
                    score = (k[first : t + 1] @ q[t]) / math.sqrt(head_dim)
                    out[t] = torch.softmax(score, 0) @ v[first : t + 1]
                heads.append(out)
            x = x + torch.cat(heads, dim=-1) @ w[p + "attn.o.weight"].T
            h = rms(x, w[p + "mlp_norm.weight"])
            up = h @ w[p + "mlp.up.weight"].T
            if c.mlp == "swiglu":
                gate = h @ w[p + "mlp.gate.weight"].T
                hidden = gate / (1 + torch.exp(-gate)) * up
            else:
                hidden = torch.where(up > 0, up * up, torch.zeros_like(up))
            x = x + hidden @ w[p + "mlp.down.weight"].T
        head_weight = w["embed.weight"] if c.tie_embeddings else w["head.weight"]
        logits = c.logit_scale * rms(x, w["norm.weight"]) @ head_weight.T
        if c.logit_softcap is not None:
            logits = c.logit_softcap * torch.tanh(logits / c.logit_softcap)
        rows.append(logits)
    return torch.stack(rows)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
@pytest.mark.parametrize("attention", ["auto", "math"])
def test_logits_equal_the_float64_reference(n_kv_heads: int, mlp: str, attention: str) -> None:
    config = dataclasses.replace(TINY, n_kv_heads=n_kv_heads, mlp=mlp, attention=attention)
    model = randomised(config)
    ids = torch.randint(0, 64, (2, 17))
    torch.testing.assert_close(
        model(ids).double(), reference_logits(model, ids), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": False},
        {"tie_embeddings": False},
        {"logit_softcap": 3.0},
        {"head_dim": 12},
        {"rope_theta": 50.0},
        {"norm_eps": 0.5},
        {"logit_scale": 0.5},
        {"window_pattern": "SSL", "window": 3, "n_layers": 5},
        {"window_pattern": "S", "window": 4, "attention": "math"},
        {"residual_scalars": True},
        {"value_embeddings": True},
        {"value_embeddings": True, "n_layers": 3, "n_kv_heads": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_option_equals_the_float64_reference(change: dict[str, object]) -> None:
    model = randomised(dataclasses.replace(TINY, **change))  # type: ignore[arg-type]
    ids = torch.randint(0, 64, (2, 9))
    logits = model(ids)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), reference_logits(model, ids), rtol=2e-5, atol=2e-5)


def test_bfloat16_compute_stays_near_the_float64_reference() -> None:
    model = randomised(TINY)
    model.compute_dtype = torch.bfloat16
    ids = torch.randint(0, 64, (2, 17))
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    expected = reference_logits(model, ids)
    assert (logits.double() - expected).norm() / expected.norm() < 0.03


def test_rope_is_relative_and_matches_the_rotation_matrix() -> None:
    from matilda_model.layers import apply_rope, rope_table

    cos, sin = rope_table(10, 4, 100.0)
    x = torch.randn(4)
    rotated = apply_rope(x.expand(1, 10, 1, 4), cos[:, None], sin[:, None])[0, :, 0]
    for t in range(10):
        for i in range(2):
            a = t * 100.0 ** (-2 * i / 4)
            matrix = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
            torch.testing.assert_close(rotated[t, [i, i + 2]], matrix @ x[[i, i + 2]])
    # the product of two rotated vectors depends on their distance alone
    torch.testing.assert_close(rotated[3] @ rotated[5], rotated[7] @ rotated[9])
