"""Sorting a model's parameters into groups."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from matilda_optim import GroupScheduler, Muon, describe_groups, param_groups


class Language(nn.Module):
    """Embedding, two blocks with a fused projection, and a tied or free head."""

    def __init__(self, tied: bool, head_first: bool = False) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(32, 100, bias=False)
        self.embed = nn.Embedding(100, 32)
        self.qkv = nn.Linear(32, 64, bias=False)
        self.up = nn.Linear(32, 128)
        self.norm = nn.RMSNorm(128)
        self.down = nn.Linear(128, 32)
        if not head_first:
            self.head = nn.Linear(32, 100, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.qkv(x)[..., :32]
        return self.head(x + self.down(self.norm(self.up(x)).relu()))


def by_name(groups: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    return {str(g["name"]): g for g in groups}


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group_and_gets_a_gradient(algorithm: str, tied: bool) -> None:
    model = Language(tied)
    groups = param_groups(model, algorithm=algorithm, lr=1e-3, weight_decay=0.1)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    names = [n for g in groups for n in g["param_names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    model(torch.arange(10)).sum().backward()
    assert all(p.grad is not None for g in groups for p in g["params"])
    for g in groups:
        assert g["initial_lr"] == g["lr"]
        assert g["algorithm"] in ("muon", "adamw")


@pytest.mark.parametrize("head_first", [True, False])
def test_a_tied_head_follows_the_embedding_whatever_the_order(head_first: bool) -> None:
    groups = by_name(param_groups(Language(True, head_first), lr=1e-3, weight_decay=0.1))
    assert "head" not in groups
    assert len(groups["embedding"]["params"]) == 1  # type: ignore[arg-type]
    assert "tied" in describe_groups(list(groups.values()))


class NanoGPT(nn.Module):
    """Token and position tables, blocks of fused attention and MLP, and a head."""

    def __init__(self, vocab: int, context: int, width: int, tied: bool) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "c_attn": nn.Linear(width, 3 * width, bias=False),
                    "c_proj": nn.Linear(width, width, bias=False),
                    "c_fc": nn.Linear(width, 4 * width, bias=False),
                    "mlp_proj": nn.Linear(4 * width, width, bias=False),
                }
            )
            for _ in range(2)
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


@pytest.mark.parametrize("tied", [True, False])
def test_layers_as_wide_as_the_context_are_no_heads(tied: bool) -> None:
    # gpt2-medium: 1,024 positions and a width of 1,024
    groups = by_name(param_groups(NanoGPT(500, 64, 64, tied), lr=1e-3, weight_decay=0.1))
    assert len(groups["hidden"]["params"]) == 8  # type: ignore[arg-type]
    assert ("head" in groups) is not tied


def test_layers_as_wide_as_the_vocabulary_are_no_heads_where_the_head_is_known() -> None:
    groups = by_name(param_groups(NanoGPT(256, 100, 64, tied=True), lr=1e-3, weight_decay=0.1))
    assert len(groups["hidden"]["params"]) == 8  # type: ignore[arg-type]
    free = NanoGPT(256, 100, 64, tied=False)
    with pytest.raises(ValueError, match=r"cannot tell whether `h\.0\.c_fc\.weight`.*`lm_head"):
        param_groups(free, lr=1e-3, weight_decay=0.1)
    told = {"lm_head": "adamw", "c_fc": "muon"}
    groups = by_name(param_groups(free, lr=1e-3, weight_decay=0.1, overrides=told))
    assert groups["matrix"]["param_names"] == ["lm_head.weight"]
    free.get_output_embeddings = lambda: free.lm_head  # type: ignore[assignment]
    groups = by_name(param_groups(free, lr=1e-3, weight_decay=0.1))
    assert groups["head"]["param_names"] == ["lm_head.weight"]
    assert len(groups["hidden"]["params"]) == 8  # type: ignore[arg-type]


class WithHeads(Language):
    """A model with further heads, of later tokens, which may name its first."""

    def __init__(self, tied: bool, names: bool) -> None:
        super().__init__(tied)
        self.later = nn.ModuleList(nn.Linear(32, 100, bias=False) for _ in range(2))
        if names:
            self.get_output_embeddings = lambda: self.head


@pytest.mark.parametrize(("tied", "names"), [(True, True), (False, True), (True, False)])
def test_a_second_head_is_asked_about_where_the_first_is_known(tied: bool, names: bool) -> None:
    model = WithHeads(tied, names)
    later = ["later.0.weight", "later.1.weight"]
    with pytest.raises(ValueError, match=r"cannot tell whether `later\.0\.weight`, `later\.1\.w"):
        param_groups(model, lr=1e-3, weight_decay=0.1)
    told = param_groups(model, lr=1e-3, weight_decay=0.1, overrides={r"^later": "adamw"})
    assert by_name(told)["matrix"]["param_names"] == later
    assert by_name(told)["hidden"]["param_names"] == ["qkv.weight", "up.weight", "down.weight"]


def test_a_second_head_is_asked_about_where_the_first_is_padded() -> None:
    model = WithHeads(False, True)
    model.head, model.later = nn.Linear(32, 104, bias=False), nn.ModuleList()
    model.second = nn.Linear(32, 104, bias=False)
    with pytest.raises(ValueError, match=r"cannot tell whether `second\.weight` should"):
        param_groups(model, lr=1e-3, weight_decay=0.1)


def test_a_head_that_the_model_names_is_known_inside_a_wrapper() -> None:
    model = Language(False)
    model.head = nn.Linear(32, 104, bias=False)  # padded, so that only its name tells
    model.get_output_embeddings = lambda: model.head  # type: ignore[assignment]
    for wrapped in (model, nn.ModuleDict({"module": model})):
        groups = by_name(param_groups(wrapped, lr=1e-3, weight_decay=0.1))
        assert groups["head"]["params"] == [model.head.weight]


class GroupedQuery(nn.Module):
    """Qwen3's layers, without its code: separate projections, gated feed-forward."""

    def __init__(self, vocab: int, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, 64)
        shapes = {
            "q_proj": (64, 128),
            "k_proj": (64, 32),
            "v_proj": (64, 32),
            "o_proj": (128, 64),
            "gate_proj": (64, 192),
            "up_proj": (64, 192),
            "down_proj": (192, 64),
        }
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*s, bias=False) for name, s in shapes.items()})
            for _ in range(2)
        )
        self.lm_head = nn.Linear(64, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [1000, 32, 64, 128, 192])
def test_a_vocabulary_as_wide_as_any_layer_leaves_a_known_heads_model_as_it_is(
    vocab: int, tied: bool
) -> None:
    groups = by_name(param_groups(GroupedQuery(vocab, tied), lr=1e-3, weight_decay=0.1))
    assert len(groups["hidden"]["params"]) == 14  # type: ignore[arg-type]
    assert groups.keys() == ({"hidden", "embedding"} if tied else {"hidden", "embedding", "head"})


def test_only_hidden_matrices_go_to_muon_and_vectors_do_not_decay() -> None:
    groups = by_name(
        param_groups(Language(False), lr=2e-3, weight_decay=0.1, adamw_lr=3e-4, embedding_lr=5e-2)
    )
    assert groups["hidden"]["param_names"] == ["qkv.weight", "up.weight", "down.weight"]
    assert groups["hidden"]["algorithm"] == "muon"
    assert groups["hidden"]["lr"] == 2e-3
    assert groups["head"]["lr"] == 3e-4
    assert groups["embedding"]["lr"] == 5e-2
    assert groups["vector"]["weight_decay"] == 0.0
    assert groups["vector"]["param_names"] == ["up.bias", "norm.weight", "down.bias"]


def test_adamw_alone_decays_matrices_only_and_embeddings_by_flag() -> None:
    groups = by_name(
        param_groups(
            Language(True), algorithm="adamw", lr=1e-3, weight_decay=0.1, decay_embeddings=False
        )
    )
    assert {g["algorithm"] for g in groups.values()} == {"adamw"}
    assert groups["matrix"]["weight_decay"] == 0.1
    assert groups["embedding"]["weight_decay"] == 0.0
    assert groups["vector"]["weight_decay"] == 0.0


def test_an_unknown_owner_is_an_error_that_names_it_and_the_override() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.zeros(32, 32))
            self.out = nn.Linear(32, 32)

    with pytest.raises(ValueError, match=r"`mix`.*overrides=\{r\"mix\": \"muon\"\}"):
        param_groups(Odd(), lr=1e-3, weight_decay=0.0)
    groups = param_groups(Odd(), lr=1e-3, weight_decay=0.0, overrides={r"^mix$": "muon"})
    assert by_name(groups)["hidden"]["param_names"] == ["mix", "out.weight"]
    groups = param_groups(Odd(), lr=1e-3, weight_decay=0.1, overrides={"mix": "adamw_no_decay"})
    assert "mix" in by_name(groups)["vector"]["param_names"]  # type: ignore[operator]
    with pytest.raises(ValueError, match="matches no"):
        param_groups(Odd(), lr=1e-3, weight_decay=0.0, overrides={"mix": "muon", "nope": "adamw"})
    with pytest.raises(ValueError, match=r"'mi' matches no .* that an earlier override has not"):
        param_groups(Odd(), lr=1e-3, weight_decay=0.0, overrides={"mix": "muon", "mi": "adamw"})
    with pytest.raises(ValueError, match="the override of"):
        param_groups(Odd(), lr=1e-3, weight_decay=0.0, overrides={"mix": "sgd"})


def test_routers_thin_depthwise_and_transposed_weights_go_to_adamw() -> None:
    model = nn.ModuleDict(
        OrderedDict(
            router=nn.Linear(64, 32, bias=False),
            gate=nn.Linear(64, 32, bias=False),
            w_gate=nn.Linear(64, 32, bias=False),
            thin=nn.Linear(64, 8, bias=False),
            depth=nn.Conv1d(32, 32, 3, groups=32, bias=False),
            up=nn.ConvTranspose2d(32, 32, 3, bias=False),
            conv=nn.Conv2d(32, 64, 3, bias=False),
            grouped=nn.Conv2d(64, 64, 3, groups=2, bias=False),
        )
    )
    groups = by_name(param_groups(model, lr=1e-3, weight_decay=0.1))
    assert groups["hidden"]["param_names"] == ["w_gate.weight", "conv.weight"]
    assert groups["hidden[heads 2]"]["param_names"] == ["grouped.weight"]
    assert len(groups["matrix"]["params"]) == 5  # type: ignore[arg-type]


def test_routers_go_to_adamw_under_any_usual_name_and_what_they_choose_from_does_not() -> None:
    def linear() -> nn.Linear:
        return nn.Linear(64, 32, bias=False)

    expert = nn.ModuleDict({"up": linear()})
    model = nn.ModuleDict(
        {
            "router": nn.ModuleDict({"proj": linear(), "experts": expert}),
            "gate_router": linear(),
            "layers": nn.ModuleList([nn.ModuleDict({"TopKRouter": linear(), "up": linear()})]),
            "routers_kept": linear(),
        }
    )
    groups = by_name(param_groups(model, lr=1e-3, weight_decay=0.1))
    assert groups["matrix"]["param_names"] == [
        "router.proj.weight",
        "gate_router.weight",
        "layers.0.TopKRouter.weight",
    ]
    assert groups["hidden"]["param_names"] == [
        "router.experts.up.weight",
        "layers.0.up.weight",
        "routers_kept.weight",
    ]


def test_fused_weights_are_cut_where_told() -> None:
    attention = nn.MultiheadAttention(32, 4)
    groups = by_name(param_groups(attention, lr=1e-3, weight_decay=0.0))
    assert groups["hidden[heads 3]"]["param_names"] == ["in_proj_weight"]
    told = param_groups(attention, lr=1e-3, weight_decay=0.0, split={"in_proj": (64, 32)})
    assert by_name(told)["hidden[split 64+32]"]["heads"] is None
    Muon(told)
    model = Language(True)
    groups = by_name(param_groups(model, lr=1e-3, weight_decay=0.0, split={"qkv": (32, 16, 16)}))
    assert groups["hidden[split 32+16+16]"]["split"] == (32, 16, 16)
    with pytest.raises(ValueError, match="matches no"):
        param_groups(model, lr=1e-3, weight_decay=0.0, split={"nope": (1,)})
    with pytest.raises(ValueError, match="adds up to"):
        Muon(param_groups(model, lr=1e-3, weight_decay=0.0, split={"qkv": (32, 16)}))


def test_an_lstms_projection_is_one_matrix_beside_its_four_gates() -> None:
    lstm = nn.LSTM(32, 96, proj_size=66, bidirectional=True)
    groups = param_groups(lstm, lr=1e-3, weight_decay=0.0)
    projections = ["weight_hr_l0", "weight_hr_l0_reverse"]
    assert by_name(groups)["hidden"]["param_names"] == projections
    gates = by_name(groups)["hidden[heads 4]"]["param_names"]
    assert sorted(gates) == sorted(  # type: ignore[call-overload]
        n for n, _ in lstm.named_parameters() if n.startswith(("weight_ih", "weight_hh"))
    )
    Muon(groups)


def test_the_audit_table_folds_layers_and_counts_everything() -> None:
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(12)])
    text = describe_groups(param_groups(model, lr=1e-3, weight_decay=0.1))
    assert "*.weight" in text
    assert "×12" in text
    assert f"total: {12 * (32 * 32 + 32):,} parameters" in text


def test_frozen_parameters_are_left_out_and_an_empty_model_is_refused() -> None:
    model = Language(False)
    model.embed.weight.requires_grad_(False)
    assert "embedding" not in by_name(param_groups(model, lr=1e-3, weight_decay=0.1))
    with pytest.raises(ValueError, match="no trainable"):
        param_groups(nn.ReLU(), lr=1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match="`algorithm`"):
        param_groups(model, algorithm="sgd", lr=1e-3, weight_decay=0.1)


class Experts(nn.Module):
    """A router and expert weights in one parameter, as transformers' mixtures have them."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 8, 32))
        self.experts = nn.Parameter(torch.zeros(4, 32, 64))
        self.router = nn.Linear(32, 4)


def test_the_question_about_expert_weights_offers_a_batch_of_matrices() -> None:
    with pytest.raises(
        ValueError, match=r"`experts`, `position` .*\{r\"experts\": \"muon_stacked\"\}"
    ):
        param_groups(Experts(), lr=1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match=r'\{r"position": "muon"\}` or `"adamw"`'):
        param_groups(Experts(), lr=1e-3, weight_decay=0.1, overrides={"experts": "muon_stacked"})


def test_patterns_and_splits_of_the_wrong_form_are_refused() -> None:
    model = Language(tied=True)
    for option in ({"overrides": {"qkv(": "muon"}}, {"split": {"qkv(": (32, 32)}}):
        with pytest.raises(ValueError, match=r"regular expressions, which 'qkv\(' is not"):
            param_groups(model, lr=1e-3, weight_decay=0.1, **option)  # type: ignore[arg-type]
    for sizes in (32, "64"):
        with pytest.raises(ValueError, match=r"`split` of 'qkv' must list the rows"):
            param_groups(model, lr=1e-3, weight_decay=0.1, split={"qkv": sizes})  # type: ignore[dict-item]


class Conv1D(nn.Module):
    """transformers' layer of GPT-2, whose weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.zeros(nx, nf))


@pytest.mark.parametrize("adjust", [None, "original", "spectral_unclamped"])
def test_a_transposed_weight_is_refused_where_fan_in_and_fan_out_differ(adjust: str | None) -> None:
    model = nn.ModuleDict({"c_fc": Conv1D(128, 32)})
    with pytest.raises(ValueError, match=r"`c_fc\.weight` is stored as \(fan-in, fan-out\)"):
        param_groups(model, lr=1e-3, weight_decay=0.1, adjust_lr_fn=adjust)
    assert param_groups(model, lr=1e-3, weight_decay=0.1)[0]["name"] == "hidden"
    told = {"c_fc": "muon"}
    assert param_groups(model, lr=1e-3, weight_decay=0.1, adjust_lr_fn=adjust, overrides=told)
    square = nn.ModuleDict({"c_proj": Conv1D(32, 32)})
    assert param_groups(square, lr=1e-3, weight_decay=0.1, adjust_lr_fn=adjust)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_parameter_without_a_shape_is_not_taken_for_a_vector() -> None:
    model = nn.Sequential(nn.LazyLinear(32))
    with pytest.raises(ValueError, match=r"`0\.weight` has no shape yet: run a batch"):
        param_groups(model, lr=1e-3, weight_decay=0.1)
    model(torch.zeros(1, 64))
    assert by_name(param_groups(model, lr=1e-3, weight_decay=0.1))["hidden"]


def test_groups_do_not_share_a_learning_rate_that_is_a_tensor() -> None:
    groups = param_groups(Language(tied=False), lr=torch.tensor(0.1), weight_decay=0.1)  # type: ignore[arg-type]
    optimizer = Muon(groups)
    schedules = {"muon": lambda step: 1.0, "default": lambda step: 0.5}
    GroupScheduler(optimizer, schedules)
    for group in optimizer.param_groups:
        assert group["lr"] == (0.1 if group["algorithm"] == "muon" else 0.05), group["name"]
        assert group["initial_lr"] == 0.1
