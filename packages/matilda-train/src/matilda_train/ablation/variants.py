"""Rows of an ablation study: each a named, single change to a config.

A change is a handful of config fields, computed from the config it changes: the SwiGLU of a ReLU²
model has two thirds of its width, another depth has another width, so that parameters stay equal.
`NAME:field=value,field=value` on the command line makes a row of its own, or adds to a named one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matilda_data import load_tokenizer
from matilda_model import ModelConfig
from matilda_train.config import RunConfig
from matilda_train.config_load import (
    apply_override,
    config_differences,
    config_from_dict,
    config_to_dict,
)
from matilda_train.data_source import mixture_phases

__all__ = ["BASELINE", "OPTIM_STEPS", "VARIANTS", "Row", "Variant", "change", "resolve_rows"]

BASELINE = "baseline"

OPTIM_STEPS = ("warmup_steps", "momentum_warmup_steps", "momentum_cooldown_steps")
"""Fields of `optim` that are steps, and follow a run's length."""

Fields = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A named change."""

    reason: str
    """What the row asks, in one line."""

    fields: Callable[[RunConfig], Fields]
    """The fields it sets; `ValueError` where the config cannot have it."""


@dataclass(frozen=True)
class Row:
    """One row of a study: a name and the whole config of its runs, seeds aside."""

    name: str
    reason: str
    fields: Fields
    config: RunConfig


def _set(**fields: Any) -> Callable[[RunConfig], Fields]:
    """The same fields for every config; `model__d_ff=8` is `model.d_ff`."""
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return lambda config: dict(named)


def _swiglu(config: RunConfig) -> Fields:
    if config.model.mlp == "swiglu":
        return {"model.mlp": "swiglu"}
    return {"model.mlp": "swiglu", "model.d_ff": _multiple(config.model.resolved_d_ff * 2 / 3, 8)}


def _relu2(config: RunConfig) -> Fields:
    if config.model.mlp == "relu2":
        return {"model.mlp": "relu2"}
    return {"model.mlp": "relu2", "model.d_ff": _multiple(config.model.resolved_d_ff * 3 / 2, 8)}


def _depth(n_layers: int) -> Callable[[RunConfig], Fields]:
    """Another number of blocks at equal parameters, the shape of a block kept."""

    def fields(config: RunConfig) -> Fields:
        model = config.model
        if model.n_layers == n_layers:
            return {"model.n_layers": n_layers}
        group, head_dim = model.n_heads // model.n_kv_heads, model.resolved_head_dim
        best: tuple[float, Fields] | None = None
        for d_model in range(32, 4 * model.d_model + 1, 32):
            kv_heads = max(1, round(d_model / head_dim / group))
            shape = {
                "n_layers": n_layers,
                "d_model": d_model,
                "n_heads": kv_heads * group,
                "n_kv_heads": kv_heads,
                "head_dim": head_dim,
            }
            d_ff = _equal_d_ff(model, shape)
            if d_ff is None:
                continue
            # the MLP's share of a block, as far as whole heads and multiples of 32 allow
            misfit = abs(d_ff / d_model - model.resolved_d_ff / model.d_model)
            if best is None or misfit < best[0]:
                best = misfit, {f"model.{k}": v for k, v in (shape | {"d_ff": d_ff}).items()}
        if best is None:
            raise ValueError(
                f"No width gives {n_layers} layers the {model.n_params:,} parameters of this "
                "config; leave the row out."
            )
        return best[1]

    return fields


def _equal_d_ff(model: ModelConfig, shape: dict[str, int]) -> int | None:
    """The MLP width with which `shape` has the parameters of `model`; None where there is none."""
    one, two = (replace(model, **shape, d_ff=width).n_params for width in (1, 2))  # type: ignore[arg-type]
    exact = 1 + (model.n_params - one) / (two - one)
    d_ff = _multiple(exact, 16 if exact >= 256 else 1)
    return d_ff if exact >= 1 and d_ff >= shape["d_model"] else None


def _wide_heads(config: RunConfig) -> Fields:
    model = config.model
    heads, rest = divmod(model.n_heads * model.resolved_head_dim, 128)
    kv_heads = model.n_kv_heads * model.resolved_head_dim / 128
    if rest or heads == 0 or kv_heads != int(kv_heads) or heads % int(kv_heads):
        raise ValueError(
            f"{model.n_heads} query and {model.n_kv_heads} key/value heads of "
            f"{model.resolved_head_dim} cannot become heads of 128; leave head_dim_128 out."
        )
    return {"model.head_dim": 128, "model.n_heads": heads, "model.n_kv_heads": int(kv_heads)}


def _windows(config: RunConfig) -> Fields:
    return {"model.window_pattern": "SSSL", "model.window": max(1, config.seq_len // 4)}


def _document_mask(config: RunConfig) -> Fields:
    return {"model.document_token": load_tokenizer(config.data.tokenizer).eot_id}


VARIANTS: dict[str, Variant] = {
    BASELINE: Variant("the config as it is", lambda config: {}),
    "no_qk_norm": Variant("no norm on queries and keys", _set(model__qk_norm=False)),
    "mha": Variant(
        "as many key/value as query heads",
        lambda config: {"model.n_kv_heads": config.model.n_heads},
    ),
    "mqa": Variant("one key/value head", _set(model__n_kv_heads=1)),
    "adamw": Variant(
        "AdamW for everything, at its own best rate of docs/LOG.md's study, decay as there",
        _set(optim__algorithm="adamw", optim__lr=1e-3, optim__weight_decay=0.1),
    ),
    "muon": Variant(
        "Muon for hidden matrices, at its best rate of docs/LOG.md's study",
        _set(optim__algorithm="muon", optim__lr=4e-3, optim__weight_decay=0.1),
    ),
    "swiglu": Variant("SwiGLU of equal parameters", _swiglu),
    "relu2": Variant("ReLU² of equal parameters", _relu2),
    "softcap_off": Variant("no soft-cap on the logits", _set(model__logit_softcap=None)),
    "softcap_15": Variant("soft-cap 15", _set(model__logit_softcap=15.0)),
    "softcap_30": Variant("soft-cap 30", _set(model__logit_softcap=30.0)),
    "z_loss_off": Variant("no z-loss", _set(model__z_loss=0.0)),
    "z_loss_on": Variant("z-loss of 1e-4", _set(model__z_loss=1e-4)),
    "cosine": Variant("cosine from the warm-up on", _set(optim__schedule="cosine")),
    "wsd": Variant("warm-up, stable, decay", _set(optim__schedule="wsd")),
    "decay_1_sqrt": Variant("WSD's decay by 1 - sqrt", _set(optim__decay_shape="1-sqrt")),
    "untied": Variant("a head of its own: more parameters", _set(model__tie_embeddings=False)),
    "depth_12": Variant("12 layers of equal parameters in all", _depth(12)),
    "depth_18": Variant("18 layers of equal parameters in all", _depth(18)),
    "zero_init_outputs": Variant("output matrices from zero", _set(model__zero_init_outputs=True)),
    "residual_scalars": Variant(
        "learned scalars of residual and embedding", _set(model__residual_scalars=True)
    ),
    "value_embeddings": Variant(
        "gated embeddings added to values: more parameters", _set(model__value_embeddings=True)
    ),
    "window": Variant("three layers in four see a quarter of the sequence", _windows),
    "head_dim_128": Variant("half as many heads, of 128", _wide_heads),
    "document_mask": Variant("no attention over document borders", _document_mask),
    "logit_scale": Variant("logits times 0.5", _set(model__logit_scale=0.5)),
}
"""Every named row, in the order of the table."""


def resolve_rows(config: RunConfig, specs: Sequence[str]) -> list[Row]:
    """Rows for `NAME`, `NAME,NAME` and `NAME:field=value,…`, the baseline first.

    Raises `ValueError`, one sentence: a name that is unknown (with the nearest) or given twice, a
    row that equals the baseline of this config or reads other tokens, a field or value that the
    config refuses.
    """
    rows = [Row(BASELINE, VARIANTS[BASELINE].reason, {}, config)]
    for spec in _split_names(specs):
        if spec != BASELINE:
            rows.append(_resolve(config, spec))
    for number, row in enumerate(rows):
        twin = next((other for other in rows[:number] if other.name == row.name), None)
        if twin is not None:
            raise ValueError(f"The row {row.name!r} is given twice; give one another name.")
    return rows


def _resolve(config: RunConfig, spec: str) -> Row:
    name, colon, text = spec.partition(":")
    if not name or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise ValueError(f"{name!r} is no name of a row; use letters, digits, '_', '-' and '.'.")
    if name == BASELINE:
        raise ValueError(f"{name!r} is always a row, and is the config; give others beside it.")
    if not colon and name not in VARIANTS:
        close = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.4)
        close.sort(key=lambda known: sorted(known) != sorted(name))  # two letters exchanged first
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"There is no row {name!r}.{hint} Known: {', '.join(VARIANTS)}; or NAME:field=value,…"
        )
    known = VARIANTS.get(name)
    fields: Fields = known.fields(config) if known else {}
    for override in _split_fields(text):
        parsed: dict[str, Any] = {}
        apply_override(parsed, override)
        ((section, values),) = parsed.items()
        ((field, value),) = values.items()
        fields[f"{section}.{field}"] = value
    changed = change(config, name, fields)
    recipe, rounding, _ = config_differences(config_to_dict(config), changed)
    if not recipe and not rounding:
        what = ", ".join(f"`{f}` = {json.dumps(v)}" for f, v in fields.items()) or "nothing"
        raise ValueError(f"Row {name!r} equals the baseline of this config ({what}); leave it out.")
    reason = known.reason if known else "as given"
    return Row(name, reason + (", and as given" if known and text else ""), fields, changed)


def change(config: RunConfig, name: str, fields: Fields) -> RunConfig:
    """The config with these fields set; of a run of the same tokens.

    Another `train.tokens_per_step` alone has as many more or fewer steps, of the whole run, of its
    warm-up and between evaluations. Raises `ValueError` naming the row `name`.
    """
    sections = config_to_dict(config)
    fields = _rescaled_steps(config, fields) | fields
    for field, value in fields.items():
        apply_override(sections, f"{field}={json.dumps(value)}")
    try:
        changed = config_from_dict(sections)
    except ValueError as error:
        raise ValueError(f"Row {name!r}: {error}") from None
    _require_same_tokens(name, config, changed)
    return changed


def _rescaled_steps(config: RunConfig, fields: Fields) -> Fields:
    tokens = fields.get("train.tokens_per_step")
    if not isinstance(tokens, int) or tokens < 1:
        return {}
    scale = config.train.tokens_per_step / tokens
    steps = {
        "train.total_steps": config.train.total_steps,
        **{f"optim.{name}": getattr(config.optim, name) for name in OPTIM_STEPS},
        "eval.every_steps": config.eval.every_steps,
        "ckpt.every_steps": config.ckpt.every_steps,
    }
    return {
        field: max(0 if field.startswith("optim.") else 1, round(n * scale))
        for field, n in steps.items()
    }


def _require_same_tokens(name: str, config: RunConfig, changed: RunConfig) -> None:
    """All rows read the same tokens in the same order, and are measured on the same ones; only how
    many make a step may differ."""
    pairs = {
        "train.seq_len": (config.seq_len, changed.seq_len),
        "train.seed": (config.train.seed, changed.train.seed),
        "data": (config.data, changed.data),
        "data.mix": (mixture_phases(config), mixture_phases(changed)),
        "eval.tokens": (config.eval.tokens, changed.eval.tokens),
        "train.total_steps` and `train.tokens_per_step": tuple(
            f"{c.plan.tokens(c.train.total_steps):,} tokens in all" for c in (config, changed)
        ),
    }
    for field, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ValueError(
                f"Row {name!r} changes `{field}` from {ours!r} to {theirs!r}: its runs would read "
                "other tokens than the baseline's and could not be paired with them; leave it out, "
                "or set it for all rows."
            )


def _split_names(specs: Sequence[str]) -> list[str]:
    """Names at their commas; what follows the colon of a row of its own stays with it."""
    names: list[str] = []
    for spec in specs:
        head, colon, fields = spec.partition(":")
        *before, name = head.split(",")
        names += [*before, name + colon + fields]
    return [name.strip() for name in names if name.strip()]


def _split_fields(text: str) -> list[str]:
    """`a.b=1,c.d=[1,2]` at the commas between fields, not those inside values."""
    fields: list[str] = []
    for piece in text.split(",") if text else []:
        if "=" in piece or not fields:
            fields.append(piece)
        else:
            fields[-1] += f",{piece}"
    return fields


def _multiple(value: float, of: int) -> int:
    return max(of, round(value / of) * of)
