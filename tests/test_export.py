"""A run becomes a folder that transformers loads: same tokens, same logits, a card of its own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from matilda_ckpt import Checkpointer
from matilda_model import ModelConfig, Transformer
from matilda_train import DataConfig, OptimConfig, RunConfig, RunDir, TrainConfig, load_run_model
from matilda_train.export import CHECK_TEXT, export_run

pytestmark = pytest.mark.filterwarnings("ignore")


def finished_run(path: Path) -> Path:
    config = RunConfig(
        model=ModelConfig(
            vocab_size=320, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64,
            mlp="relu2", logit_softcap=15.0,
        ),
        optim=OptimConfig(),
        data=DataConfig(dir="/where/the/shards/lay", tokenizer="byte"),
        train=TrainConfig(total_steps=7, tokens_per_step=256, micro_batch_size=4),
    )  # fmt: skip
    opened = RunDir.open(path, config, data_id="d" * 64, provenance=dict)
    torch.manual_seed(0)
    model = Transformer(config.model)
    with Checkpointer(path / "checkpoints") as checkpoints:
        checkpoints.save(7, {"model": model})
    opened.close()
    return path


def test_a_run_is_exported_with_tokenizer_and_card(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the export extra")
    run = finished_run(tmp_path / "run")
    assert export_run(run, tmp_path / "out") < 1e-4
    assert "[y/N]" not in capfd.readouterr().out  # transformers asks before it runs a folder's code
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    ).float()
    ours, own_tokenizer = load_run_model(run, device="cpu")
    ours.compute_dtype = torch.float32
    text = "<|endoftext|>The heart"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == [256, *own_tokenizer.encode("The heart").tolist()]
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours(ids), rtol=1e-3, atol=1e-3)
    continued = theirs.generate(ids, max_new_tokens=3, do_sample=False)
    assert continued.shape == (1, ids.shape[1] + 3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1,792 (7 steps)" in card
    assert "{logit_difference}" not in card
    assert "/where/the/shards/lay" not in card
    capfd.readouterr()
    monkeypatch.chdir(tmp_path / "out")
    exec(card.partition("```python\n")[2].partition("```")[0], {})  # as a reader would
    assert capfd.readouterr().out.startswith("<|endoftext|>The heart")


def test_without_the_extra_the_message_says_how_to_add_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"`uv run --extra export …` or `pip install "):
        export_run(finished_run(tmp_path / "run"), tmp_path / "out")


def test_a_tokenizer_that_disagrees_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs the export extra")
    from matilda_train import export

    right = export.transformers_files

    def shifted(*arguments: object, **options: object) -> dict[str, str]:
        files = right(*arguments, **options)  # type: ignore[arg-type]
        description = json.loads(files["tokenizer.json"])
        vocabulary = description["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        return files | {"tokenizer.json": json.dumps(description)}

    monkeypatch.setattr(export, "transformers_files", shifted)
    with pytest.raises(ValueError, match="tokenizer files do not encode the check text"):
        export_run(finished_run(tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no `run\.json`"):
        export_run(tmp_path, tmp_path / "out")
    run = finished_run(tmp_path / "run")
    with pytest.raises(ValueError, match="no two tokens"):
        export_run(run, tmp_path / "out", text="a")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        export_run(run, tmp_path / "out", text=CHECK_TEXT)
