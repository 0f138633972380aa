"""Cached decoding equals the full forward pass; sampling does what its arguments say."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from matilda_model import (
    KVCache,
    ModelConfig,
    Transformer,
    generate,
    sample,
    stream_choices,
    stream_tokens,
)

CONFIG = ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=48)


def model(**change: object) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(dataclasses.replace(CONFIG, **change))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize(
    "change",
    [
        {"n_kv_heads": 4},
        {"n_kv_heads": 1},
        {"residual_scalars": True, "value_embeddings": True},
        {"window_pattern": "SL", "window": 5},
        {"document_token": 0},
        {"document_token": 0, "window_pattern": "SL", "window": 5},
    ],
    ids=["mha", "mqa", "options", "window", "documents", "documents and window"],
)
def test_cached_decoding_equals_the_full_forward(change: dict[str, object]) -> None:
    net = model(**change)
    ids = torch.randint(1, 64, (3, 20))
    ids[0, [0, 4, 11]] = ids[1, 15] = ids[2, 6:8] = 0  # where documents begin, if they do
    cache = KVCache(net.config, 3, 20, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        full = net(ids)
        parts = [net(ids[:, :7], cache=cache)]
        for t in range(7, 20):
            parts.append(net(ids[:, t : t + 1], cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-4)


def test_a_cache_takes_no_more_than_it_holds_and_no_targets() -> None:
    net = model()
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="`capacity` 49 exceeds the model's `max_seq_len` 48"):
        KVCache(net.config, 1, 49, device="cpu", dtype=torch.float32)
    cache = KVCache(net.config, 1, 6, device="cpu", dtype=torch.float32)
    net(ids, cache=cache)
    with pytest.raises(ValueError, match="one token per row at a time, not 2"):
        net(ids[:, :2], cache=cache)
    with pytest.raises(ValueError, match="holds 6 tokens and 8 are asked for"):
        net(ids, cache=cache)
    with pytest.raises(ValueError, match="a `cache` is for generation"):
        net(ids, ids, cache=cache)  # type: ignore[call-overload]


def test_greedy_generation_equals_argmax_of_the_full_forward() -> None:
    net = model()
    ids = [5, 9, 2]
    got = generate(net, ids, max_new_tokens=20, temperature=0)
    expected = list(ids)
    for _ in range(20):
        expected.append(int(net(torch.tensor([expected]))[0, -1].argmax()))
    assert got == expected[3:]


def test_a_batch_of_unequal_prompts_equals_each_prompt_alone() -> None:
    net = model()
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [8, 8, 8]]
    together = generate(net, prompts, max_new_tokens=15, temperature=0)
    alone = [generate(net, prompt, max_new_tokens=15, temperature=0) for prompt in prompts]
    assert together == alone


def test_logits_are_made_for_the_last_place_of_each_prompt_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = model(logit_softcap=5.0)
    made = []
    logits_of = Transformer.logits

    def counted(self: Transformer, h: torch.Tensor) -> torch.Tensor:
        logits = logits_of(self, h)
        made.append(logits.numel() // 64)
        return logits

    monkeypatch.setattr(Transformer, "logits", counted)
    generate(net, [[1] * 30, [2] * 7, [3]], max_new_tokens=4, temperature=0)
    assert made == [3] * 4


def test_logits_of_chosen_places_are_those_of_the_whole() -> None:
    net = model(logit_softcap=5.0)
    ids, places = torch.randint(0, 64, (3, 9)), torch.tensor([8, 0, 4])
    torch.testing.assert_close(net(ids, places_B=places), net(ids)[[0, 1, 2], places])
    with pytest.raises(ValueError, match="`places_B` chooses logits"):
        net(ids, ids, places_B=places)  # type: ignore[call-overload]


@pytest.mark.filterwarnings("ignore")  # torch warns of its own interfaces here
def test_a_compiled_model_generates_what_the_model_does() -> None:
    net = model()
    prompts = [[1, 2, 3, 4, 5], [9]]
    expected = generate(net, prompts, max_new_tokens=6, temperature=0)
    calls = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        calls.append(graph)
        return graph.forward

    compiled: Any = torch.compile(net, backend=backend)
    assert generate(compiled, prompts, max_new_tokens=6, temperature=0) == expected
    assert calls  # the compiled model ran, not the one within


def test_the_seed_fixes_the_sample() -> None:
    net = model()

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return generate(net, [1, 2], max_new_tokens=20, generator=generator)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_generation_leaves_the_default_generator_alone_when_given_its_own() -> None:
    net = model()
    before = torch.random.get_rng_state()
    generate(net, [1], max_new_tokens=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_padding_rows_of_the_vocabulary_are_never_produced() -> None:
    net = model()
    with torch.no_grad():
        net.embed.weight[50:] = 10.0 * net.embed.weight[50:].abs().max()  # make padding likely
    for temperature in (0.0, 5.0):
        rows = generate(net, [[1], [2]], max_new_tokens=40, temperature=temperature, vocab_limit=50)
        assert max(max(row) for row in rows) < 50


def test_stop_ids_end_their_row_only_and_are_not_returned() -> None:
    net = model()
    first = generate(net, [1, 2], max_new_tokens=12, temperature=0)
    stop = first[4]
    end = first.index(stop)
    assert generate(net, [1, 2], max_new_tokens=12, temperature=0, stop_ids=[stop]) == first[:end]
    rows = generate(net, [[1, 2], [7]], max_new_tokens=12, temperature=0, stop_ids=[stop])
    assert rows[0] == first[:end]
    other = generate(net, [7], max_new_tokens=12, temperature=0, stop_ids=[stop])
    assert rows[1] == other


def test_stop_ids_and_top_k_are_integers_of_any_kind() -> None:
    class Whole:  # as numpy's integers, which the test need not have
        def __init__(self, value: int) -> None:
            self.value = value

        def __index__(self) -> int:
            return self.value

    net = model()
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0}
    first = generate(net, [1, 2], **options)
    expected = first[: first.index(first[4])]
    kinds: list[Any] = [torch.tensor([first[4]]), {first[4]}, [Whole(first[4])], iter([first[4]])]
    for stops in kinds:
        assert generate(net, [1, 2], stop_ids=stops, **options) == expected
    two: Any = Whole(2)
    draws = sample(torch.zeros(200, 4), top_k=two)
    assert len(set(draws.tolist())) == 2


def test_a_row_ends_with_the_token_that_its_condition_holds_for() -> None:
    m = model()
    prompts = [[1, 2, 3], [9]]
    whole = generate(m, prompts, max_new_tokens=8, temperature=0.0)
    cut = generate(
        m,
        prompts,
        max_new_tokens=8,
        temperature=0.0,
        stop_when=lambda ids: list(ids) == whole[0][:3] or len(ids) == 5,
    )
    assert cut == [whole[0][:3], whole[1][:5]]


def test_streaming_yields_the_same_tokens_and_keeps_grad_mode() -> None:
    net = model()
    expected = generate(net, [3], max_new_tokens=10, temperature=0)
    got = []
    for token in stream_tokens(net, [3], max_new_tokens=10, temperature=0):
        assert torch.is_grad_enabled()
        got.append(token)
    assert got == expected


def test_choices_are_generates_tokens_with_the_full_forwards_probabilities() -> None:
    net = model()
    draw: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.7, "top_k": 9, "vocab_limit": 60}
    ids = generate(net, [3, 8], generator=torch.Generator().manual_seed(1), **draw)
    seeded = torch.Generator().manual_seed(1)
    choices = list(stream_choices(net, [3, 8], candidates=4, generator=seeded, **draw))
    assert [choice.token for choice in choices] == ids
    for place, choice in enumerate(choices):
        logits = net(torch.tensor([[3, 8, *ids[:place]]]))[0, -1, :60]
        expected = logits.detach().float().softmax(dim=-1)
        assert choice.probability == pytest.approx(float(expected[choice.token]), rel=1e-4)
        assert [i for i, _ in choice.candidates] == expected.topk(4).indices.tolist()
        assert dict(choice.candidates) == {
            i: pytest.approx(float(expected[i]), rel=1e-4) for i, _ in choice.candidates
        }


def test_top_k_and_top_p_restrict_the_draw() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, -1)
    torch.manual_seed(0)
    assert set(sample(logits, top_k=2).tolist()) == {0, 1}
    assert set(sample(logits, top_k=3).tolist()) == {0, 1, 2}
    assert set(sample(logits, top_p=0.9).tolist()) == {0, 1, 2}
    assert set(sample(logits, top_p=0.01).tolist()) == {0}
    assert set(sample(logits, top_p=5e-324).tolist()) == {0}
    assert set(sample(logits, temperature=0).tolist()) == {0}
    frequency = (sample(logits, top_k=2) == 0).double().mean().item()
    assert abs(frequency - 0.5 / 0.8) < 0.04
    hot = (sample(logits, temperature=2.0) == 0).double().mean().item()
    weights = [p**0.5 for p in (0.5, 0.3, 0.15, 0.05)]
    assert abs(hot - weights[0] / sum(weights)) < 0.04


def test_top_k_keeps_no_more_than_k_of_equal_logits() -> None:
    # logits from a bfloat16 product are often equal
    draws = sample(torch.tensor([[1.0, 2.0, 2.0, 2.0]]).expand(500, -1), top_k=1)
    assert len(set(draws.tolist())) == 1


@pytest.mark.parametrize("temperature", [1e-40, 1e-6])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.9]])
    assert sample(logits, temperature=temperature).tolist() == [1]


def test_a_row_with_its_own_generator_draws_the_same_in_any_batch() -> None:
    net = model()

    def draws(prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return generate(net, prompts, max_new_tokens=8, generator=generators)

    together = draws([[1, 2], [5], [9, 9, 9]], [3, 4, 5])
    assert draws([[1, 2]], [3]) == together[:1]
    assert draws([[9, 9, 9], [5]], [5, 4]) == together[:0:-1]


def test_prompts_may_be_tensors_arrays_and_lists_of_tensors() -> None:
    net = model()
    rows = [[1, 2, 3], [7, 8, 9]]
    expected = generate(net, rows, max_new_tokens=3, temperature=0)
    for prompts in (torch.tensor(rows), [torch.tensor(row) for row in rows], map(list, rows)):
        assert generate(net, prompts, max_new_tokens=3, temperature=0) == expected  # type: ignore[call-overload]
    got = list(stream_tokens(net, torch.tensor(rows[1]), max_new_tokens=3, temperature=0))
    assert got == expected[1]


def test_generation_works_in_bfloat16() -> None:
    net = model()
    net.compute_dtype = torch.bfloat16
    assert len(generate(net, [1], max_new_tokens=5, temperature=0)) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [{}, {"window_pattern": "SL", "window": 5}])
def test_generation_works_under_autocast(dtype: torch.dtype, change: dict[str, object]) -> None:
    net = model(**change)
    net.compute_dtype = dtype
    ids = torch.randint(0, 64, (2, 12))
    cache = KVCache(net.config, 2, 12, device="cpu", dtype=dtype)
    with torch.no_grad():
        exact = net(ids)
        with torch.autocast("cpu", torch.bfloat16):
            parts = [net(ids[:, :7], cache=cache)]
            parts += [net(ids[:, t : t + 1], cache=cache) for t in range(7, 12)]
    assert cache.layers[0].k_BKSE.dtype == dtype
    error = (torch.cat(parts, dim=1) - exact).norm() / exact.norm()
    assert error < 0.05  # bfloat16's; rows of another place are 1.4 apart
    with torch.autocast("cpu", torch.bfloat16):
        rows = generate(net, [[1, 2, 3], [4]], max_new_tokens=5, temperature=0)
    assert [len(row) for row in rows] == [5, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "`prompt_ids` is empty"),
        ({"prompt_ids": [[1], []]}, "`prompt_ids` is empty"),
        ({"prompt_ids": [5, 64]}, "holds 64, which is outside 0..63"),
        ({"prompt_ids": [5, -1]}, "holds -1, which is outside 0..63"),
        ({"prompt_ids": [55], "vocab_limit": 50}, "holds 55, which is outside 0..49"),
        ({"prompt_ids": "text"}, "must be token ids, or several rows of them.*encode text first"),
        ({"prompt_ids": [1.5]}, "must be token ids"),
        ({"prompt_ids": [1, [2]]}, "must be token ids"),
        ({"max_new_tokens": 48}, "exceed the model's `max_seq_len` 48"),
        ({"temperature": -1.0}, "`temperature` must be at least 0"),
        ({"top_k": 0}, "`top_k` must be an integer of at least 1"),
        ({"top_k": 2.0}, "`top_k` must be an integer of at least 1"),
        ({"top_k": "2"}, "`top_k` must be an integer of at least 1"),
        ({"stop_ids": ["a"]}, r"`stop_ids` must hold token ids, not \['a'\].*give a list"),
        ({"stop_ids": [1.0]}, r"`stop_ids` must hold token ids, not \[1\.0\]"),
        ({"stop_ids": "</s>"}, "`stop_ids` must hold token ids, not '</s>'"),
        ({"stop_ids": 5}, "`stop_ids` must hold token ids, not 5"),
        ({"stop_ids": None}, "`stop_ids` must hold token ids, not None"),
        ({"stop_ids": torch.tensor([0.5])}, "`stop_ids` must hold token ids"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\]"),
        ({"vocab_limit": 65}, "`vocab_limit` must be in 1..64"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 prompts"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    call: dict[str, object] = {"prompt_ids": [1], "max_new_tokens": 4} | arguments
    with pytest.raises(ValueError, match=message):
        generate(model(), **call)  # type: ignore[call-overload]
    with pytest.raises(ValueError):  # when it is called, not at its first token
        stream_tokens(model(), **call)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}])
def test_sample_refuses_what_generate_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        sample(torch.zeros(1, 4), **options)


@pytest.mark.filterwarnings("ignore")  # torch warns of its own limit here
@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_compiled_for_one_shape_generates(in_place: bool) -> None:
    net = model()
    expected = generate(net, [1, 2, 3], max_new_tokens=14, temperature=0)
    compiled: Any = net
    if in_place:
        net.compile(fullgraph=True, dynamic=False, backend="eager")
    else:
        compiled = torch.compile(net, fullgraph=True, dynamic=False, backend="eager")
    assert generate(compiled, [1, 2, 3], max_new_tokens=14, temperature=0) == expected
    assert list(stream_tokens(compiled, [1, 2, 3], max_new_tokens=14, temperature=0)) == expected


def test_what_ddp_wrapped_generates_and_what_is_no_model_is_named() -> None:
    class Wrapper(torch.nn.Module):  # DDP's attributes, without its processes
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    net = model()
    arguments: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0}
    expected = generate(net, [1, 2, 3], **arguments)
    assert generate(Wrapper(net), [1, 2, 3], **arguments) == expected  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="must be a `Transformer`, not a 'Linear'"):
        generate(torch.nn.Linear(2, 2), [1], **arguments)  # type: ignore[call-overload]
