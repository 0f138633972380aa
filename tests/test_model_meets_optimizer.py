"""The transformer under the optimizer: groups for every config, and a batch that is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from matilda_model import Transformer, count_params
from matilda_train import load_config
from matilda_train.build import build_optimizer
from matilda_train.schedules import Schedules

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("base_124m", 114_151_680),
        ("base_152m_v2", 151_910_400),
        ("base_350m", 362_931_136),
        ("calibration", 114_151_680),
    ],
)
def test_config_has_its_exact_parameter_count(name: str, params: int) -> None:
    config = load_config(CONFIGS / f"{name}.json")
    assert count_params(config.model) == params
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config.model).parameters()) == params


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_parameter_of_a_config_is_in_exactly_one_group(path: Path) -> None:
    config = load_config(path)
    with torch.device("meta"):
        model = Transformer(config.model)
    optimizer = build_optimizer(config.optim, model)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        hidden = name.startswith("blocks.") and p.ndim == 2
        muon = hidden and config.optim.algorithm == "muon"
        assert of[id(p)]["algorithm"] == ("muon" if muon else "adamw"), name
        if p.ndim < 2:
            assert of[id(p)]["weight_decay"] == 0, name


@pytest.mark.parametrize("tied", ["true", "false"])
def test_layers_as_wide_as_the_vocabulary_go_to_muon(tied: str) -> None:
    wide = ["model.d_model=320", "model.head_dim=32", f"model.tie_embeddings={tied}"]
    config = load_config(CONFIGS / "quickstart.json", wide)
    assert config.model.vocab_size == config.model.d_model
    with torch.device("meta"):
        model = Transformer(config.model)
    groups = {group["name"]: group for group in build_optimizer(config.optim, model).param_groups}
    names = {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert set(groups["hidden"]["param_names"]) == names


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_the_embedding_may_have_a_rate_of_its_own_which_is_logged(
    algorithm: str, tied: str
) -> None:
    rates = ["optim.lr=0.02", "optim.adamw_lr=0.004", "optim.schedule=constant"]
    given = [f"optim.algorithm={algorithm}", f"model.tie_embeddings={tied}", *rates]
    for own in ("null", "0.3"):
        config = load_config(
            CONFIGS / "quickstart.json",
            [*given, f"optim.embedding_lr={own}", "optim.warmup_steps=0"],
        )
        with torch.device("meta"):
            model = Transformer(config.model)
        optimizer = build_optimizer(config.optim, model)
        schedules = Schedules(config, optimizer)
        schedules.apply(0)
        rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        others = 0.004 if algorithm == "muon" else 0.02
        for name, p in model.named_parameters():
            expected = others
            if name.startswith("blocks.") and p.ndim == 2:
                expected = 0.02
            if own != "null" and name == "embed.weight":
                expected = 0.3
            assert rate_of[id(p)] == expected, name
        logged = {"lr_adamw": others, **({"lr_muon": 0.02} if algorithm == "muon" else {})}
        if own != "null":
            logged["lr_embedding"] = 0.3
        assert schedules.learning_rates() == logged


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_transformer_overfits_one_batch(algorithm: str) -> None:
    rate = "0.02" if algorithm == "muon" else "0.005"
    config = load_config(
        CONFIGS / "verify_resume.json",
        [f"optim.algorithm={algorithm}", f"optim.lr={rate}", "train.total_steps=60"],
    )
    torch.manual_seed(0)
    model = Transformer(config.model)
    optimizer = build_optimizer(config.optim, model)
    schedules = Schedules(config, optimizer)
    tokens = torch.randint(0, 257, (4, config.seq_len + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for step in range(config.train.total_steps):
        schedules.apply(step)
        loss = model(inputs, targets).loss
        loss.backward()
        if step == 0:
            first = loss.item()
            assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.2 * first
