"""A run as a Hugging Face folder: weights, tokenizer and a card that says where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from matilda_data import transformers_files
from matilda_model import count_params, export_transformers
from matilda_train.config import RunConfig
from matilda_train.trained_model import load_trained

__all__ = ["CHECK_TEXT", "export_run"]

CHECK_TEXT = """\
Call me Ishmael. Some years ago — never mind how long precisely — having little or no money in my
purse, and nothing particular to interest me on shore, I thought I would sail about a little and see
the watery part of the world. It is a way I have of driving off the spleen, and regulating the
circulation.

    def fibonacci(n):
        a, b = 0, 1
        while n > 0:
            a, b, n = b, a + b, n - 1
        return a

Ελληνικά, 日本語 and 1,024.5 °C: it's 3 a.m.
"""


def export_run(
    run_dir: str | Path, folder: str | Path, *, step: int | None = None, text: str = CHECK_TEXT
) -> float:
    """Write the newest healthy checkpoint of a run, or the one at `step`, for transformers.

    `folder` gets safetensors weights, `config.json`, tokenizer files, a model card and, for shapes
    that transformers has no class for, a small one. Nothing is written unless transformers'
    tokenizer encodes `text` to the run's own ids and its model gives this model's logits for them;
    returns the largest difference, as a share of the largest logit.

    Raises `ValueError` for what the user can mend and when anything disagrees; `CheckpointError`
    when there is no such checkpoint.
    """
    trained = load_trained(run_dir, step=step, device="cpu")
    config, model, tokenizer = trained.config, trained.model, trained.tokenizer
    model.compute_dtype = torch.float32
    ids = torch.from_numpy(tokenizer.encode(text).astype("int64"))[: config.model.max_seq_len]
    if len(ids) < 2:
        raise ValueError("The text that the export is checked on has no two tokens; give a longer.")
    return export_transformers(
        model,
        folder,
        ids[None],
        eos_token_id=tokenizer.eot_id,
        card=model_card(config, trained.run, trained.step),
        tokenizer_files=transformers_files(tokenizer, max_length=config.model.max_seq_len),
        check_text=text,
    )


def model_card(config: RunConfig, description: dict[str, Any], step: int) -> str:
    """The README.md of an export: shape, data, recipe and how to load it, from the run itself."""
    model, run_id = config.model, description["run_id"]
    own_class = model.mlp != "swiglu" or model.logit_softcap is not None
    trust = ", trust_remote_code=True" if own_class else ""
    rows = {
        "parameters": f"{count_params(model):,}",
        "layers, width, heads, key/value heads": (
            f"{model.n_layers}, {model.d_model}, {model.n_heads}, {model.n_kv_heads}"
        ),
        "longest sequence": f"{model.max_seq_len:,} tokens",
        "tokenizer": f"{config.data.tokenizer}, {model.vocab_size:,} rows",
        "training tokens": f"{config.plan.tokens(step):,} ({step:,} steps)",
        "optimizer": config.optim.algorithm,
        "data": f"`{description.get('data_id', 'unknown')}`",
        "run": f"`{run_id}`, config `{str(description.get('config_sha256', ''))[:16]}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    recipe = json.dumps(_without_places(description["config"]), indent=1)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [matilda]
---

# {model.n_layers}-layer language model of {count_params(model) / 1e6:.0f}M parameters

Trained from scratch with Matilda. A base model: it continues text, it does not follow instructions,
and it says false things fluently.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this card lies, or the name of its repository on the hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
ids = tokenizer("<|endoftext|>The heart", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))
```

Documents begin with `<|endoftext|>` in training; begin a prompt with it. Weights are float32. The
export was checked on real text: the tokenizer gives the training's ids, and the logits differ from
the training code's by {{logit_difference}} of the largest.

| | |
|---|---|
{table}

The whole config of the run:

```json
{recipe}
```
"""


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """The config without where its data lay: a card is published, a file system is not."""
    return config | {"data": {key: value for key, value in config["data"].items() if key != "dir"}}
