"""Config files and overrides: what is accepted, and the sentence for what is not."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from itertools import pairwise
from pathlib import Path

import pytest

import matilda_train.config
from matilda_model import flops_per_token
from matilda_train import config_from_dict, config_to_dict, load_config
from matilda_train.config import RunConfig
from matilda_train.config_load import config_differences, config_identity


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(
        json.dumps(
            {
                "model": {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1},
                "optim": {"warmup_steps": 10},
                "train": {"tokens_per_step": 2048, "micro_batch_size": 1},
            }
        )
    )
    return path


def test_config_survives_a_round_trip_through_json(config_file: Path) -> None:
    config = load_config(config_file)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_overrides_take_json_values_and_plain_words(config_file: Path) -> None:
    config = load_config(
        config_file,
        ["optim.lr=1", "optim.betas=[0.8, 0.9]", "train.device=cpu", "model.logit_softcap=null"],
    )
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.optim.betas == (0.8, 0.9)
    assert config.train.device == "cpu"
    assert config.model.logit_softcap is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "Did you mean `optim.lr`?"),
        ("optm.lr=1", "Did you mean `optim`?"),
        ("optim.lr=fast", "`optim.lr` is 'fast', but must be of type float and finite."),
        ("optim.lr=Infinity", "must be of type float and finite"),
        ("optim.adamw_lr=x", "but must be of type float and finite or null."),
        ("data.mix=prose=83,code=17", "but must be a list of str values."),
        ("data.mix=3", "`data.mix` is 3, but must be a list of str values."),
        ("data.mix=[3]", "`data.mix[0]` is 3, but must be of type str."),
        ("train.seed=-1", "`train.seed` is -1, but must be 0 or more and below 2^32."),
        ("optim.lr=-1", "`optim.lr` is -1.0, but must be positive."),
        ("train.total_steps=1.5", "`train.total_steps` is 1.5, but must be of type int."),
        ("train.total_steps=true", "must be of type int"),
        ("train.compile=True", "`train.compile` is 'True', but must be true or false."),
        ("optim.betas=0.9", "must be a list of 2 values"),
        ("optim.schedule=cosin", "Did you mean 'cosine'?"),
        ("train.tokens_per_step=1000", "a multiple of the sequence length (1024)"),
        ("model.n_kv_heads=3", "n_kv_heads"),
        ("model.vocab_size=65537", "at most 65536"),
        ("eval.every=sometimes", "`eval.every`: 'sometimes' is no duration"),
        ("ckpt.every=0 min", "`ckpt.every` is '0 min', but must be above 0"),
        ("log.every=true", "must be of type int or of type str or null"),
        ("train.micro_batch_size=automatic", "must be 'auto' or of type int."),
        ("train.micro_batch_size=0", "1 or more, or 'auto'"),
        ("optim.decay_fraction=1", "1000 steps of decay and 10 of `optim.warmup_steps` do not fit"),
        (
            "lr=1",
            "takes section.field=value without spaces, but got 'lr=1'. Did you mean `optim.lr`?",
        ),
        ("every_steps=5", "`eval.every_steps` or `ckpt.every_steps` or `log.every_steps`?"),
        (
            "model.mlp=swglu",
            "`mlp` must be one of swiglu, relu2, not 'swglu'; did you mean 'swiglu'?",
        ),
        ("optim.lr", "`--set` takes section.field=value"),
        ("model=3", "`--set` takes section.field=value"),
    ],
)
def test_bad_override_is_one_sentence_that_names_it(
    config_file: Path, override: str, said: str
) -> None:
    with pytest.raises(ValueError) as raised:
        load_config(config_file, [override])
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


FIELDS = [
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(RunConfig)
    for field in dataclasses.fields(typing.get_type_hints(RunConfig)[section.name])
]
MAGNITUDES = ["1e400", "1e308", "5e-324", "1e18", "1" + 30 * "0", "1" + 400 * "0", "9" * 5000]
ABSURD = [
    *[sign + number for sign in ("", "-") for number in (*MAGNITUDES, "0", "1")],
    *("NaN", "Infinity", "-Infinity", f"{2**31}", f"{2**63}", "null", "true", '"\\u0000"', "[]"),
    *('"1e999 tokens"', '"1e-99 s"', '["1e400 steps: 5"]', f'["1 step: {10**18}"]', "[" * 9999),
    *("[1e400, 1e400]", f"[{10**400}, 0]", "[5e-324, 0.5]"),
]


@pytest.mark.parametrize("name", FIELDS)
def test_absurd_value_of_any_field_is_taken_or_refused_in_one_sentence(
    config_file: Path, name: str
) -> None:
    for value in ABSURD:
        try:
            config = load_config(config_file, [f"{name}={value}"])
        except ValueError as error:
            said = str(error)
            assert "\n" not in said
            named = [field for field in FIELDS if field.split(".")[1] in said]
            assert named, said
        else:
            # What a run computes from it before it asks for memory.
            flops = flops_per_token(config.model, config.seq_len, causal=False)
            assert math.isfinite(flops * config.plan.tokens(config.train.total_steps) / 1.0)
            assert config.model.n_params * 8 < 2**63


def test_missing_file_suggests_its_neighbour(config_file: Path) -> None:
    with pytest.raises(ValueError, match=r"Did you mean '.*small\.json'"):
        load_config(config_file.with_name("smal.json"))


REPEATED = '{"train": {"total_steps": 5}, "train": {"seed": 3}}'


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '{"model": 3}', REPEATED])
def test_malformed_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ('{// shape\n"model": {}}', "JSON has no comments, so remove this one."),
        ('{"model": {} # shape\n}', "JSON has no comments, so remove this one."),
        ('{"train": {"seed": 3,}\n}', "remove the comma before `}`."),
        ('{"optim": {"betas": [0.9, 0.95,\n]}}', "remove the comma before `]`."),
        ("{'model': {}}", "write it in double quotes."),
        ("\n", "the file is empty."),
    ],
)
def test_what_json_has_not_is_named(tmp_path: Path, text: str, advice: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        load_config(path)
    assert str(raised.value).endswith(f"; {advice}")
    assert "is not valid JSON: " in str(raised.value)


def test_a_byte_order_mark_is_no_mistake(config_file: Path) -> None:
    config = load_config(config_file)
    config_file.write_bytes(b"\xef\xbb\xbf" + config_file.read_bytes())
    assert load_config(config_file) == config


def test_micro_batch_that_does_not_divide_the_batch_is_refused(config_file: Path) -> None:
    config = load_config(config_file)
    assert config.batch_size == 2
    assert config.grad_accum_steps(world_size=2) == 1
    with pytest.raises(ValueError, match="does not divide"):
        config.grad_accum_steps(world_size=3)


def test_identity_covers_the_recipe_and_nothing_else(config_file: Path) -> None:
    plain = load_config(config_file)
    cadence = load_config(config_file, ["log.every_steps=1", "eval.tokens=2048", "data.dir=x"])
    rounding = load_config(config_file, ["train.micro_batch_size=2", "train.compile=false"])
    recipe = load_config(config_file, ["optim.lr=0.5"])
    assert config_identity(plain) == config_identity(cadence) == config_identity(rounding)
    assert config_identity(plain) != config_identity(recipe)
    assert config_differences(config_to_dict(plain), cadence) == (
        {},
        {},
        {
            "data.dir": "None → 'x'",
            "eval.tokens": "1048576 → 2048",
            "log.every_steps": "10 → 1",
        },
    )
    assert config_differences(config_to_dict(plain), recipe) == (
        {"optim.lr": "0.004 → 0.5"},
        {},
        {},
    )
    assert set(config_differences(config_to_dict(plain), rounding)[1]) == {
        "train.compile",
        "train.micro_batch_size",
    }


def test_every_field_of_every_section_says_what_it_is() -> None:
    files = sorted(Path(matilda_train.config.__path__[0]).glob("*.py"))
    assert len(files) > 7
    for file in files:
        lines = file.read_text().splitlines()
        for line, following in pairwise(lines):
            is_field = re.fullmatch(r"    \w+: .* = .*", line) and "= field(" not in line
            if is_field:
                assert following.strip().startswith('"""'), f"{file.name}: {line} has no docstring"


@pytest.mark.parametrize("raw", [None, [], "model", {"model": {1: 2}}, {1: {}}])
def test_what_is_no_object_of_sections_is_refused_like_any_other_mistake(raw: object) -> None:
    with pytest.raises(ValueError, match=r"must be an object of sections|Unknown config key"):
        config_from_dict(raw)  # type: ignore[arg-type]
