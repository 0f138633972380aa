"""Properties of the model a user relies on: counts, causality, learning, determinism."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from matilda_model import (
    ModelConfig,
    Transformer,
    count_matmul_params,
    count_params,
    flops_per_token,
)
from matilda_model.attention import causal_attention

V1 = ModelConfig()
HERO = ModelConfig(
    n_layers=18, max_seq_len=2048, mlp="relu2", mlp_ratio=4.0, logit_softcap=30.0, z_loss=1e-4
)
REFERENCE_350M = ModelConfig(
    n_layers=32, d_model=960, n_heads=15, n_kv_heads=5, d_ff=2560, max_seq_len=2048
)
TINY = ModelConfig(vocab_size=128, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
TINY_HERO = dataclasses.replace(TINY, mlp="relu2", mlp_ratio=4.0, logit_softcap=30.0, z_loss=1e-4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [(V1, 114_151_680), (HERO, 151_910_400), (REFERENCE_350M, 362_931_136)],
    ids=["base_124m", "base_152m_v2", "base_350m"],
)
def test_parameter_counts_are_exact(config: ModelConfig, expected: int) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert count_params(config) == config.n_params == expected


@pytest.mark.parametrize(
    "change",
    [
        {"tie_embeddings": False},
        {"qk_norm": False},
        {"head_dim": 8},
        {"residual_scalars": True},
        {"value_embeddings": True, "n_layers": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_count_params_follows_every_option(change: dict[str, object]) -> None:
    config = dataclasses.replace(TINY, **change)  # type: ignore[arg-type]
    assert count_params(config) == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("config", [TINY, TINY_HERO], ids=["swiglu", "relu2"])
def test_no_future_token_leaks_into_the_past(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = Transformer(config)
    ids = torch.randint(0, 128, (2, 32))
    changed = ids.clone()
    changed[:, 20] = (ids[:, 20] + 1) % 128
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize(
    "config",
    [TINY, TINY_HERO, dataclasses.replace(HERO, n_layers=2)],
    ids=["tiny", "tiny_hero", "hero's width and vocabulary"],
)
def test_initial_loss_is_within_one_percent_of_ln_vocab(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = Transformer(config)
    ids = torch.randint(0, config.vocab_size, (4, 33))
    with torch.no_grad():
        out = model(ids[:, :-1], ids[:, 1:])
    assert abs(out.ce.item() / math.log(config.vocab_size) - 1) < 0.01


@pytest.mark.parametrize("config", [TINY, TINY_HERO], ids=["swiglu", "relu2"])
def test_one_batch_is_overfit(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    ids = torch.randint(0, 128, (2, 17))
    for _ in range(80):
        out = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert out.ce.item() < 0.05


@pytest.mark.parametrize("loss", ["plain", "chunked"])
@pytest.mark.parametrize("extra", [False, True], ids=["plain shape", "every option"])
def test_gradients_reach_every_parameter(loss: str, extra: bool) -> None:
    torch.manual_seed(0)
    options = {"tie_embeddings": not extra, "residual_scalars": extra, "value_embeddings": extra}
    model = Transformer(dataclasses.replace(TINY_HERO, loss=loss, **options))
    ids = torch.arange(129).remainder(128)[None].expand(2, -1)
    ids = torch.cat((ids[:, :64], ids[:, 64:128]), dim=0)
    model(ids[:, :-1], ids[:, 1:]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_the_seed_fixes_the_weights_and_the_default_generator_is_the_source() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return {k: v.clone() for k, v in Transformer(TINY).state_dict().items()}

    first, second, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])

    model = Transformer(TINY)
    model.init_weights(torch.Generator().manual_seed(1))
    again = Transformer(TINY)
    again.init_weights(torch.Generator().manual_seed(1))
    assert torch.equal(model.embed.weight, again.embed.weight)


def test_a_model_built_on_meta_is_initialised_after_to_empty() -> None:
    with torch.device("meta"):
        model = Transformer(TINY)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    torch.manual_seed(3)
    expected = Transformer(TINY)
    ids = torch.randint(0, 128, (1, 16))
    assert torch.equal(model(ids), expected(ids))


def test_the_rope_table_is_true_after_the_meta_device_and_after_casts() -> None:
    expected = Transformer(TINY)
    ids = torch.randint(0, 128, (1, 16))
    with torch.device("meta"):
        model = Transformer(TINY)
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert torch.equal(model(ids), expected(ids))
    for cast in (torch.bfloat16, torch.float64):
        model.to(cast)
        assert model.cos.dtype == model.sin.dtype == torch.float32
        assert torch.equal(model.cos, expected.cos)
        model.compute_dtype = cast
        model(ids[:, :-1], ids[:, 1:]).loss.backward()
        assert model.embed.weight.grad is not None
        assert model.embed.weight.grad.dtype == cast
        model.zero_grad()


def test_only_back_ends_can_be_chosen_anew() -> None:
    model = Transformer(TINY)
    model.choose_backends(loss="plain", attention="math")
    assert (model.config.loss, model.config.attention) == ("plain", "math")
    assert model.blocks[0].attn.backend == "math"
    with pytest.raises(ValueError, match="`loss` must be one of"):
        model.choose_backends(loss="fast")
    with pytest.raises(TypeError, match="n_heads"):
        model.choose_backends(n_heads=8)  # type: ignore[call-arg]


def test_training_on_a_cpu_is_bitwise_repeatable() -> None:
    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Transformer(TINY_HERO)
        ids = torch.randint(0, 128, (4, 33))
        model(ids[:, :-1], ids[:, 1:]).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_accumulated_gradients_equal_those_of_the_big_batch() -> None:
    torch.manual_seed(0)
    model = Transformer(TINY_HERO)
    ids = torch.randint(0, 128, (8, 33))
    model(ids[:, :-1], ids[:, 1:]).loss.backward()
    big = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for part in ids.split(2):
        (model(part[:, :-1], part[:, 1:]).loss / 4).backward()
    small = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(big, small, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [TINY, TINY_HERO], ids=["swiglu", "relu2"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_flops_per_token_equal_torch_own_count(config: ModelConfig, tie: bool) -> None:
    # the math back end computes the whole square, twice that in backward: the PaLM convention
    config = dataclasses.replace(config, attention="math", loss="plain", tie_embeddings=tie)
    model = Transformer(config)
    ids = torch.randint(0, 128, (2, 49))
    with FlopCounterMode(display=False) as counter:
        model(ids[:, :-1], ids[:, 1:]).loss.backward()
    assert counter.get_total_flops() == flops_per_token(config, 48, causal=False) * 2 * 48


def test_flops_count_the_gates_of_value_embeddings() -> None:
    config = dataclasses.replace(TINY, attention="math", value_embeddings=True, n_layers=3)
    model = Transformer(config)
    ids = torch.randint(0, 128, (2, 49))
    with FlopCounterMode(display=False) as counter:
        model(ids[:, :-1], ids[:, 1:]).loss.backward()
    assert counter.get_total_flops() == flops_per_token(config, 48, causal=False) * 2 * 48


def test_initial_weights_have_the_spread_that_the_config_says() -> None:
    config = ModelConfig(
        vocab_size=512,
        d_model=128,
        n_layers=8,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=16,
        init_std=0.03,
        embed_init_std=0.5,
    )
    torch.manual_seed(0)
    for name, parameter in Transformer(config).named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        # what is added to the residual stream, twice a layer, adds up to the same
        output = name.endswith(("attn.o.weight", "mlp.down.weight"))
        expected = 0.5 if name == "embed.weight" else 0.03 / (4.0 if output else 1.0)
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < 0.05 * expected, name


def test_zero_init_outputs_start_every_block_at_identity() -> None:
    model = Transformer(dataclasses.replace(TINY_HERO, zero_init_outputs=True))
    ids = torch.randint(0, 128, (1, 8))
    embedded = torch.nn.functional.embedding(ids, model.embed.weight)
    assert torch.equal(model.hidden(ids), model.norm(embedded))


def test_residual_scalars_and_value_gates_start_neutral() -> None:
    model = Transformer(dataclasses.replace(TINY, residual_scalars=True, value_embeddings=True))
    assert model.residual_scale is not None
    assert model.embed_scale is not None
    assert (model.residual_scale == 1).all()
    assert (model.embed_scale == 0).all()
    assert (model.blocks[1].attn.value_gate.weight == 0).all()
    assert model.blocks[0].attn.value_embed is None


def test_a_window_bounds_what_a_token_reaches_and_its_flops() -> None:
    config = dataclasses.replace(TINY, window=4, window_pattern="SSL", n_layers=3)
    assert [config.layer_window(i) for i in range(3)] == [4, 4, None]
    sliding = dataclasses.replace(config, n_layers=2)  # the last layer is full: look before it
    model = Transformer(sliding)
    ids = torch.randint(0, 128, (1, 16))
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 1) % 128
    block = model.blocks[0]
    cos, sin = model.cos[:16, None], model.sin[:16, None]
    before, after = (block(model.embed(i), cos, sin, i)[0] for i in (ids, changed))
    same = (before == after).all(-1)[0]
    assert same.tolist() == [not 3 <= t < 7 for t in range(16)]

    attention = flops_per_token(config, 16, causal=False) - 6 * count_matmul_params(config)
    assert attention == 12 * 64 * (4 + 4 + 16)
    causal = flops_per_token(config, 16, causal=True) - 6 * count_matmul_params(config)
    assert causal == 12 * 64 * (3.5 + 3.5 + 8)  # 4 * (1 - 4 / 32) of a window, half of the rest
    uneven = flops_per_token(dataclasses.replace(config, window=3), 10, causal=True)
    assert uneven - 6 * count_matmul_params(config) == int(12 * 64 * (2.55 + 2.55 + 5))


@pytest.mark.parametrize("change", [{}, {"window": 6, "window_pattern": "SL"}], ids=["", "window"])
def test_packed_documents_equal_each_document_alone(change: dict[str, object]) -> None:
    config = dataclasses.replace(TINY, document_token=0, **change)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = Transformer(config)
    documents = [torch.randint(1, 128, (length,)) for length in (5, 12, 1, 14)]
    row = torch.cat([torch.cat([torch.zeros(1, dtype=torch.int64), d]) for d in documents])
    whole = torch.stack([row, row])
    with torch.no_grad():
        packed = model(whole)
        start = 0
        for document in documents:
            stop = start + 1 + len(document)
            torch.testing.assert_close(packed[0, start:stop], model(row[None, start:stop])[0])
            start = stop
    unmasked = Transformer(dataclasses.replace(config, document_token=None))
    unmasked.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(unmasked(whole)[0, 6:], packed[0, 6:])
    plain = Transformer(dataclasses.replace(config, attention="math"))
    with FlopCounterMode(display=False) as counter:
        plain(whole, whole).loss.backward()
    # a dense kernel computes what a mask hides: counted without windows
    dense = dataclasses.replace(config, window=None, window_pattern="L")
    assert counter.get_total_flops() == flops_per_token(dense, 36, causal=False) * 2 * 36


@pytest.mark.filterwarnings("ignore")  # torch warns that flex is slow when not compiled
def test_flex_attention_equals_math_with_and_without_a_window() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, heads, 16) for heads in (4, 2, 2))
    documents = torch.tensor([0] * 9 + [1] * 20 + [2] * 11)[None]
    for window in (None, 7):
        for number in (None, documents):
            torch.testing.assert_close(
                causal_attention(q, k, v, "flex", window, number),
                causal_attention(q, k, v, "math", window, number),
            )


def test_causal_flops_halve_the_attention_term_only() -> None:
    attention = 12 * 18 * 768 * 2048
    full = flops_per_token(HERO, 2048, causal=False)
    assert full - flops_per_token(HERO, 2048, causal=True) == attention // 2
    assert full == 6 * (151_910_400 - 18 * (2 * 768 + 128) - 768) + attention


def test_a_compiled_model_is_one_graph_and_gives_the_same_loss() -> None:
    torch.manual_seed(0)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    ids = torch.randint(0, 128, (2, 33))
    for loss in ("plain", "chunked"):
        graphs.clear()
        model = Transformer(dataclasses.replace(TINY_HERO, loss=loss))
        expected = model(ids[:, :-1], ids[:, 1:]).loss
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
        out = compiled(ids[:, :-1], ids[:, 1:])
        assert len(graphs) == 1
        torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 5}, "`n_heads` 5 is not a multiple of `n_kv_heads`"),
        ({"d_model": 66}, "`d_model` 66 is not a multiple"),
        ({"head_dim": 7}, "head dimension 7 is odd"),
        ({"mlp": "gelu"}, "`mlp` must be one of swiglu, relu2, not 'gelu'"),
        ({"mlp": "relu"}, "not 'relu'; did you mean 'relu2'?"),
        ({"attention": "fast"}, "`attention` must be one of"),
        ({"loss": "x"}, "`loss` must be one of"),
        ({"vocab_size": 0}, "`vocab_size` must be a positive integer, not 0"),
        ({"n_layers": 2.0}, "`n_layers` must be a positive integer, not 2.0"),
        ({"z_loss": -1.0}, "`z_loss` must be a finite number at least 0, not -1.0"),
        ({"logit_softcap": 0.0}, "`logit_softcap` must be a finite number greater than 0"),
        ({"norm_eps": math.nan}, "`norm_eps` must be a finite number"),
        ({"window_pattern": "SXL"}, "`window_pattern` must be made of L and S"),
        ({"window_pattern": "SL"}, "has S layers: set `window`"),
        ({"window": 8}, "`window` 8 is of no layer"),
        ({"mlp_ratio": 0.001}, "`mlp_ratio` 0.001 of `d_model` 64 leaves the MLP no hidden unit"),
        ({"window_pattern": "SL", "window": 8, "attention": "flash"}, "has no window"),
        ({"qk_norm": 1}, "`qk_norm` must be true or false"),
        ({"document_token": 128}, "`document_token` 128 is no row of the vocabulary"),
        ({"document_token": -1}, "`document_token` must be a token id, not -1"),
        ({"document_token": 0, "attention": "cudnn"}, "'cudnn' has no document mask"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_config_is_refused_in_one_sentence(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(TINY, **change)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
@pytest.mark.parametrize("loss", ["plain", "chunked"])
def test_empty_and_single_token_batches_are_batches(shape: tuple[int, int], loss: str) -> None:
    model = Transformer(dataclasses.replace(TINY_HERO, loss=loss))
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        ids = torch.zeros(shape, dtype=torch.int64)
        out = model(ids, ids)
        out.loss.backward()
        assert model(ids).shape == (*shape, 128)
        assert model(ids, ids, per_token=True).shape == shape
        assert bool(out.loss > 0) is (ids.numel() > 0)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_sequence_longer_than_max_seq_len_is_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens exceeds `max_seq_len` 64"):
        Transformer(TINY)(torch.zeros(1, 65, dtype=torch.int64))
