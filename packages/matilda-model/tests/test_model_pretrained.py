"""Saving, loading and exporting: equal bits, equal logits, and refusal of what is damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from matilda_model import (
    ModelConfig,
    Transformer,
    export_transformers,
    load_pretrained,
    save_pretrained,
)
from matilda_model.tensor_file import write_tensors

LAST = "model-00002-of-00002.safetensors"

CONFIG = ModelConfig(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32
)  # fmt: skip


def made(**change: object) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(CONFIG, **change))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def as_run(model: Transformer, folder: Path, steps: tuple[int, ...] = (10,)) -> Path:
    """A run directory as the trainer leaves it, as far as loading looks."""
    folder.mkdir()
    section = {"config": {"model": dataclasses.asdict(model.config)}}
    (folder / "run.json").write_text(json.dumps(section))
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        weights = {name: value.detach() for name, value in model.named_parameters()}
        names = sorted(weights)
        files = {}
        for i, keys in enumerate((names[:3], names[3:])):  # a file has 256 MiB at the most
            file = checkpoint / f"model-{i + 1:05d}-of-00002.safetensors"
            write_tensors(file, {name: weights[name] for name in keys})
            files[file.name] = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        manifest = {
            "files": files,
            "state": {"model": {"tensors": list(files)}},
            "health": {"healthy": True},
        }
        (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
        (checkpoint / "COMMIT").write_text("{}")
    return folder


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_saved_model_loads_with_equal_bits(tie: bool, tmp_path: Path) -> None:
    model = made(tie_embeddings=tie, mlp="relu2", logit_softcap=15.0)
    loaded = load_pretrained(save_pretrained(model, tmp_path / "model"))
    assert loaded.config == model.config
    assert not loaded.training
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "change",
    [
        {"tie_embeddings": False, "mlp": "relu2"},
        {"residual_scalars": True, "value_embeddings": True, "rope_theta": 500.0},
    ],
    ids=["untied", "options"],
)
def test_loading_draws_nothing_and_fills_every_tensor(
    change: dict[str, object], tmp_path: Path
) -> None:
    model = made(**change)
    save_pretrained(model, tmp_path / "model")
    run = as_run(model, tmp_path / "run")
    for path in (tmp_path / "model", run):
        before = torch.get_rng_state()
        loaded = load_pretrained(path)
        assert torch.equal(torch.get_rng_state(), before)
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                assert torch.equal(theirs[name], tensor), name
                assert theirs[name].requires_grad == tensor.requires_grad
        ids = torch.randint(0, 64, (2, 9))
        assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("wrap", ["blocks compiled", "activation checkpointing"])
def test_wrapped_blocks_are_saved_under_their_own_names(tmp_path: Path, wrap: str) -> None:
    model = made()
    ids = torch.randint(0, 64, (2, 9))
    expected = model(ids)
    for i, block in enumerate(model.blocks):
        compiled = torch.compile(block, backend="eager")
        wrapped = compiled if wrap == "blocks compiled" else checkpoint_wrapper(block)
        assert isinstance(wrapped, torch.nn.Module)
        model.blocks[i] = wrapped
    loaded = load_pretrained(save_pretrained(model, tmp_path / "model"))
    assert torch.equal(loaded(ids), expected)
    pytest.importorskip("transformers", reason="needs the `export` extra")
    assert export_transformers(model, tmp_path / "exported", ids) <= 1e-4


def test_what_holds_no_transformer_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    model: Any = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="`model` must be a `Transformer`, not a 'Linear'"):
        save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model = made()
    compiled = torch.compile(model, backend="eager")
    loaded = load_pretrained(save_pretrained(compiled, tmp_path / "model"))  # type: ignore[arg-type]
    assert torch.equal(loaded.embed.weight, model.embed.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_is_saved_as_it_is_and_loads_in_float32(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made().to(dtype)
    loaded = load_pretrained(save_pretrained(model, tmp_path / "model"))
    assert torch.equal(loaded.embed.weight, model.embed.weight.float())


def test_the_file_is_one_that_the_safetensors_package_reads(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    model = made()
    save_pretrained(model, tmp_path)
    theirs = safetensors.load_file(tmp_path / "model.safetensors")
    assert set(theirs) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(theirs[name], value) for name, value in model.named_parameters())


def test_a_run_and_a_checkpoint_load_in_one_line(tmp_path: Path) -> None:
    model = made()
    run = as_run(model, tmp_path / "run", steps=(5, 10))
    for path in (run, run / "checkpoints" / "step-00000005"):
        loaded = load_pretrained(path, compute_dtype=torch.bfloat16)
        assert torch.equal(loaded.embed.weight, model.embed.weight)
        assert loaded.compute_dtype == torch.bfloat16


def test_an_uncommitted_or_unhealthy_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run = as_run(made(), tmp_path / "run", steps=(5, 10, 15))
    (run / "checkpoints" / "step-00000015" / "COMMIT").unlink()
    manifest = run / "checkpoints" / "step-00000010" / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace("true", "false"))
    (run / "checkpoints" / "step-00000015" / LAST).write_bytes(b"")
    (run / "checkpoints" / "step-00000010" / LAST).write_bytes(b"")
    load_pretrained(run)
    (run / "checkpoints" / "step-00000005" / "COMMIT").unlink()
    with pytest.raises(ValueError, match="no committed, healthy checkpoint"):
        load_pretrained(run)


def test_a_flipped_bit_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    run = as_run(made(), tmp_path / "run")
    weights = run / "checkpoints" / "step-00000010" / LAST
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is damaged or missing"):
        load_pretrained(run)
    weights.unlink()
    with pytest.raises(ValueError, match="is damaged or missing"):
        load_pretrained(run)
    (weights.parent / "MANIFEST.json").write_text('{"files": {}}')
    with pytest.raises(ValueError, match="lists no weights of a model"):
        load_pretrained(run)


def test_damaged_or_foreign_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no saved model, run or checkpoint"):
        load_pretrained(tmp_path)
    folder = save_pretrained(made(), tmp_path / "model")
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    for length in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="no readable safetensors file"):
            load_pretrained(folder)
    for header in (b"[1]", b"null", b'"x"'):
        weights.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match="no readable safetensors file"):
            load_pretrained(folder)
    weights.write_bytes(whole)
    config.write_text(text.replace('"d_model": 32', '"d_model": 64'))
    with pytest.raises(ValueError, match="has shape"):
        load_pretrained(folder)
    config.write_text(text.replace('"n_layers": 2', '"n_layers": 3'))
    with pytest.raises(ValueError, match=r"disagree on 'blocks\.2"):
        load_pretrained(folder)
    config.write_text(text.replace('"d_model"', '"d_modle"'))
    with pytest.raises(ValueError, match="unknown field 'd_modle'"):
        load_pretrained(folder)
    config.write_text(text.replace('"n_heads": 4', '"n_heads": 3'))
    with pytest.raises(ValueError, match=r"the config of '.*model' is wrong: `n_heads` 3"):
        load_pretrained(folder)
    config.write_text('{"format": "matilda-model/1"}')
    with pytest.raises(ValueError, match="has no section `model`"):
        load_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors' is no readable"):
        load_pretrained(folder)
    config.write_text("[")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [{}, {"tie_embeddings": False}, {"mlp": "relu2", "logit_softcap": 5.0}, {"logit_softcap": 5.0}],
    ids=["qwen3", "untied", "relu2 with soft-cap", "swiglu with soft-cap"],
)
def test_transformers_gives_the_same_logits(change: dict[str, object], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the export extra")
    model = made(**change)
    ids = torch.randint(0, 64, (2, 20))
    difference = export_transformers(
        model, tmp_path / "out", ids, eos_token_id=0, card="off by {logit_difference}\n"
    )
    assert difference < 1e-4
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=bool(set(change) & {"mlp", "logit_softcap"})
    )
    torch.testing.assert_close(
        again.float()(input_ids=ids).logits, model(ids), rtol=1e-3, atol=1e-3
    )
    assert (tmp_path / "out" / "README.md").read_text() == f"off by {difference:.1e}\n"
    with pytest.raises(ValueError, match="exists: choose a new folder"):
        export_transformers(model, tmp_path / "out", ids)


def exported(folder: Path, **change: object) -> Any:
    """The class that travels with the weights, as transformers loads it in float32."""
    transformers = pytest.importorskip("transformers", reason="needs the export extra")
    export_transformers(made(**change), folder, torch.randint(0, 64, (2, 20)), eos_token_id=0)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float()


OWN_CLASS = pytest.mark.parametrize(
    "change",
    [{"mlp": "relu2", "logit_softcap": 5.0}, {"logit_softcap": 5.0}, {"mlp": "relu2"}],
    ids=["relu2 with soft-cap", "swiglu with soft-cap", "relu2"],
)


@pytest.mark.filterwarnings("ignore")
@OWN_CLASS
def test_an_export_accumulates_gradients_as_one_batch(
    change: dict[str, object], tmp_path: Path
) -> None:
    model = exported(tmp_path / "out", **change)
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (4, 12))
    labels = ids.clone()
    labels[0, 3:] = -100
    logits = model(input_ids=ids).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    weights = list(model.parameters())
    wanted = torch.autograd.grad(expected, weights)
    count = (labels[:, 1:] != -100).sum()
    losses = [
        model(input_ids=ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss
        for i in range(4)
    ]
    torch.testing.assert_close(sum(losses), expected.detach().float())
    for got, want in zip(torch.autograd.grad(sum(losses), weights), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, expected.float())


@pytest.mark.filterwarnings("ignore")
@OWN_CLASS
def test_an_export_takes_what_qwen3_takes(change: dict[str, object], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the export extra")
    model = exported(tmp_path / "out", **change)
    # Trainer keeps the columns, and generate makes the mask, that the signature names
    theirs = set(inspect.signature(transformers.Qwen3ForCausalLM.forward).parameters)
    named = set(inspect.signature(model.forward).parameters)
    assert theirs - {"self", "cache_position"} <= named  # the latter was dropped after 5.0
    ids = torch.randint(0, 64, (2, 9))
    out = model(input_ids=ids, labels=ids)
    loss, logits = model(input_ids=ids, labels=ids, use_cache=False, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    last = model(input_ids=ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, out.logits[:, -1:])
    chosen = model(input_ids=ids, logits_to_keep=torch.tensor([2, 5])).logits
    torch.testing.assert_close(chosen, out.logits[:, [2, 5]])
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == 3


@pytest.mark.filterwarnings("ignore")
@OWN_CLASS
def test_an_export_continues_padded_prompts_as_each_alone(
    change: dict[str, object], tmp_path: Path
) -> None:
    model = exported(tmp_path / "out", **change)
    short, long = [5, 6, 7], [8, 9, 10, 11, 12, 13, 14]
    rows = torch.tensor([[63] * (len(long) - len(short)) + short, long])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 63, "eos_token_id": None}
    together = model.generate(rows, **options)[:, len(long) :].tolist()
    for row, prompt in zip(together, (short, long), strict=True):
        alone = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert row == alone


@pytest.mark.filterwarnings("ignore")
def test_an_export_whose_logits_disagree_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the export extra")
    from matilda_model import export

    right = export._config_json

    def wrong(*arguments: object) -> dict[str, object]:
        return right(*arguments) | {"rms_norm_eps": 0.5}  # type: ignore[arg-type]

    monkeypatch.setattr(export, "_config_json", wrong)
    with pytest.raises(ValueError, match="not exported: transformers' logits differ"):
        export_transformers(made(), tmp_path / "out", torch.randint(0, 64, (1, 8)))
    assert list(tmp_path.iterdir()) == []


def test_a_shape_without_a_counterpart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`qk_norm` is off"):
        export_transformers(made(qk_norm=False), tmp_path / "out", torch.zeros(1, 4).long())


@pytest.mark.parametrize("shape", [(4,), (1, 1), (0, 4)])
def test_too_few_ids_to_check_an_export_on_are_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="give rows of at least two"):
        export_transformers(made(), tmp_path / "out", torch.zeros(shape, dtype=torch.int64))
