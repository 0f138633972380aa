"""Export to Hugging Face transformers, refused unless the logits agree.

A SwiGLU model with QK-norm and without soft-cap is a `Qwen3ForCausalLM` as it stands. The ReLU² and
soft-cap family has no class of its own there; its folder carries a small one
(`modeling_matilda.py`, loaded with `trust_remote_code=True`) that subclasses Qwen3's.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matilda_model.model import Transformer
from matilda_model.pretrained import unwrapped, whole_weights
from matilda_model.tensor_file import write_tensors

_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attn.q.weight": "self_attn.q_proj.weight",
    "attn.k.weight": "self_attn.k_proj.weight",
    "attn.v.weight": "self_attn.v_proj.weight",
    "attn.o.weight": "self_attn.o_proj.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_TOLERANCE = 1e-4


def export_transformers(
    model: Transformer,
    folder: str | Path,
    check_ids_BT: Tensor,
    *,
    eos_token_id: int | None = None,
    card: str = "",
    tokenizer_files: Mapping[str, str] | None = None,
    check_text: str = "",
) -> float:
    """Write `folder` for `AutoModelForCausalLM.from_pretrained`; the largest logit difference.

    `check_ids_BT` (int64, real text) is run through this model and through the exported folder,
    both in float32; nothing is written unless every logit agrees to 1e-4 of the largest. With
    `tokenizer_files` (name to content, for `AutoTokenizer`) the folder's tokenizer must also encode
    `check_text` to ids that begin with the first row of `check_ids_BT`, and decode them back.
    `card` becomes README.md; `{logit_difference}` in it is replaced by the largest difference.

    Needs the `export` extra. Raises ValueError when the shape has no counterpart, when `folder`
    exists, when the extra is missing and when logits or tokens disagree.
    """
    model = unwrapped(model)
    config, folder = model.config, Path(folder)
    if not config.qk_norm:
        raise ValueError("`qk_norm` is off, which transformers' Qwen3 cannot express: not exported")
    for name in ("residual_scalars", "value_embeddings", "window", "document_token"):
        if getattr(config, name) not in (None, False):
            raise ValueError(f"`{name}` has no counterpart in transformers' Qwen3: not exported")
    if check_ids_BT.ndim != 2 or check_ids_BT.shape[1] < 2 or check_ids_BT.shape[0] < 1:
        raise ValueError(
            f"`check_ids_BT` has shape {tuple(check_ids_BT.shape)!r}: give rows of at least two "
            "ids, for one alone shows neither attention nor positions"
        )
    if folder.exists():
        raise ValueError(f"{str(folder)!r} exists: choose a new folder for the export")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError(
            "export needs transformers, which is not installed; add it with `uv run --extra export "
            "…` or `pip install 'matilda-model[export]'`"
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        own_class = config.mlp != "swiglu" or config.logit_softcap is not None
        description = _config_json(model, own_class, eos_token_id)
        (staging / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        write_tensors(staging / "model.safetensors", _renamed(model))
        if own_class:
            # not a module here: importing every module must not need transformers
            code = resources.files("matilda_model").joinpath("modeling_matilda.py.txt").read_text()
            (staging / "modeling_matilda.py").write_text(code)
        for name, content in (tokenizer_files or {}).items():
            (staging / name).write_text(content, encoding="utf-8")
        if tokenizer_files:
            # it reads the model's config, too, and asks the user before it trusts our own class
            tokenizer = AutoTokenizer.from_pretrained(staging, trust_remote_code=own_class)
            _check_tokenizer(tokenizer, check_text, check_ids_BT[0])
        exported: Any = AutoModelForCausalLM.from_pretrained(
            staging, trust_remote_code=own_class, dtype=torch.float32, attn_implementation="eager"
        )
        difference = _logit_difference(model, exported, check_ids_BT)
        if not difference <= _TOLERANCE:
            raise ValueError(
                f"not exported: transformers' logits differ by {difference:.2g} of the largest, "
                f"allowed {_TOLERANCE:g}"
            )
        if card:
            filled = card.replace("{logit_difference}", f"{difference:.1e}")
            (staging / "README.md").write_text(filled, encoding="utf-8")
        staging.chmod(0o755)
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return difference


def _check_tokenizer(tokenizer: Any, text: str, expected: Tensor) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if len(ids) < len(expected) or ids[: len(expected)] != expected.tolist():
        raise ValueError(
            "not exported: the tokenizer files do not encode the check text to the ids given"
        )
    if tokenizer.decode(ids) != text:
        raise ValueError("not exported: the tokenizer files do not decode the check text back")


@torch.no_grad()
def _logit_difference(model: Transformer, exported: Any, ids_BT: Tensor) -> float:
    """Largest absolute difference over the largest logit; NaN when anything is not finite."""
    dtype, model.compute_dtype = model.compute_dtype, torch.float32
    try:
        ours = model(ids_BT.to(model.embed.weight.device)).cpu()
    finally:
        model.compute_dtype = dtype
    theirs = exported.eval()(input_ids=ids_BT.cpu()).logits.float()
    return float((ours - theirs).abs().max() / ours.abs().max())


def _renamed(model: Transformer) -> dict[str, Tensor]:
    tensors = {}
    for name, weight in whole_weights(model).items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            tensors[f"model.layers.{index}.{_NAMES[rest]}"] = weight
        else:
            outer = {
                "embed.weight": "model.embed_tokens.weight",
                "norm.weight": "model.norm.weight",
                "head.weight": "lm_head.weight",
            }
            tensors[outer[name]] = weight
    if model.config.logit_scale != 1.0:  # the final norm's weight takes the factor
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * model.config.logit_scale
    return tensors


def _config_json(model: Transformer, own_class: bool, eos: int | None) -> dict[str, Any]:
    config = model.config
    description: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.resolved_d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.resolved_head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "eos_token_id": eos,
        "bos_token_id": eos,
        "dtype": "float32",
    }
    if own_class:
        description |= {
            "architectures": ["MatildaForCausalLM"],
            "model_type": "matilda",
            "auto_map": {
                "AutoConfig": "modeling_matilda.MatildaConfig",
                "AutoModelForCausalLM": "modeling_matilda.MatildaForCausalLM",
            },
            "mlp": config.mlp,
            "logit_softcap": config.logit_softcap,
        }
    return description
