"""What each parameter of a model is, by the module that owns it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

_TELL = (
    'say which by `overrides={{r"{pattern}": "{choice}"}}`{stacked} or `"adamw"` '
    "(regular expressions on names)"
)
_STACKED = ' (a batch of matrices, as of expert weights), `"muon"` (one matrix, flattened)'


class Owner(NamedTuple):
    """One place where a parameter is registered."""

    module_name: str
    module: nn.Module
    leaf: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is done with one parameter, and why."""

    role: str
    """"hidden" (Muon), "embedding", "head", "matrix" (AdamW with decay) or "vector" (no decay)."""
    reason: str
    """For people, in the audit table."""
    heads: int | None = None
    """Equal blocks of rows of a fused weight."""
    stacked: bool = False
    """Whether the leading dimension is a batch of matrices."""
    transposed: bool = False
    """Whether the matrix is stored as (fan-in, fan-out)."""


def owners_of(model: nn.Module) -> dict[int, list[Owner]]:
    """id(parameter) → every place that registers it: ties are seen whatever their order."""
    found: dict[int, list[Owner]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for leaf, param in module._parameters.items():
            if param is not None:
                found.setdefault(id(param), []).append(Owner(module_name, module, leaf))
    return found


def heads_of(model: nn.Module) -> dict[int, bool]:
    """ids of the weights that are output heads (True) or that may be (False).

    A model that names its head is believed (`get_output_embeddings`, as transformers' models have
    it), also inside another module, such as DDP. In others, a Linear with as many rows as an
    embedding that no Linear is tied to is that embedding's head. Where several have that many rows
    it cannot be told which, unless the table is not the largest: then it is one of positions, say,
    and they are layers of that width.

    Beside a known head, a Linear as high as the vocabulary may be a second one (of a later token,
    say) where the model has no Linear that could take in its output.
    """
    linears = _weights(model, _is_linear)
    tables = _weights(model, _is_embedding)
    vocabulary = max((len(table) for table in tables.values()), default=0)
    heads: dict[int, bool] = {}
    heights = {vocabulary}
    for named in _named_heads(model):
        heads[id(named)] = True
        heights.add(len(named))  # a head may be padded
        tables = {}
    for table in (table for i, table in tables.items() if i not in linears):
        alike = [i for i, weight in linears.items() if len(weight) == len(table)]
        if len(alike) == 1 or len(table) == vocabulary:
            heads |= dict.fromkeys(alike, len(alike) == 1)
    for i, weight in linears.items():
        if len(weight) in heights and not _has_taker(len(weight), linears.values()):
            heads.setdefault(i, False)
    return heads


def _named_heads(model: nn.Module) -> list[nn.Parameter]:
    """The weights of what the model, or a model in it, names as its output head."""
    getters = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    heads = (getattr(getter(), "weight", None) for getter in getters if callable(getter))
    return [head for head in heads if isinstance(head, nn.Parameter)]


def _has_taker(rows: int, linears: Iterable[nn.Parameter]) -> bool:
    """Whether a Linear takes in `rows` features, or, as with grouped keys, copies of them."""
    return rows == 0 or any(weight.shape[1] % rows == 0 for weight in linears)


def _weights(model: nn.Module, of_kind: Callable[[nn.Module], bool]) -> dict[int, nn.Parameter]:
    """The two-dimensional weights of the modules of a kind, by id."""
    weights = (getattr(module, "weight", None) for module in model.modules() if of_kind(module))
    return {id(w): w for w in weights if isinstance(w, nn.Parameter) and w.ndim == 2}


def classify(
    name: str,
    param: nn.Parameter,
    owners: list[Owner],
    *,
    heads: Mapping[int, bool],
    min_dim: int,
) -> Verdict | None:
    """The verdict on one parameter, or None where only a person can tell."""
    if any(_is_embedding(owner.module) for owner in owners):
        tied = sum(1 for o in owners if not _is_embedding(o.module))
        return Verdict(role="embedding", reason="embedding, tied" if tied else "embedding")
    if param.ndim < 2:
        return Verdict(role="vector", reason="fewer than two dimensions")
    if any(_is_norm(owner.module) for owner in owners):
        return Verdict(role="vector", reason="normalisation")
    if id(param) in heads:
        return Verdict(role="head", reason="output head") if heads[id(param)] else None
    owner = owners[0]
    module, leaf = owner.module, owner.leaf
    if _is_linear(module) and leaf == "weight":
        # the last two: routers are called `router`, `gate_router` or `router.proj`
        components = owner.module_name.lower().split(".")[-2:]
        router = any(component.endswith("router") for component in components)
        if router or (components[-1] == "gate" and param.shape[0] < param.shape[1]):
            return Verdict(role="matrix", reason="router or gate")
        return _by_size(param, min_dim, "linear")
    if isinstance(module, nn.modules.conv._ConvNd) and leaf == "weight":
        if module.transposed:
            return Verdict(role="matrix", reason="transposed convolution")
        if module.groups > 1 and module.groups == module.in_channels:
            return Verdict(role="matrix", reason="depthwise convolution")
        blocks = module.groups if module.groups > 1 else None
        rows = param.shape[0] // module.groups
        if min(rows, param.shape[1:].numel()) < min_dim:
            return Verdict(role="matrix", reason=f"smaller than {min_dim}")
        return Verdict(role="hidden", reason="convolution, flattened", heads=blocks)
    if isinstance(module, nn.MultiheadAttention):
        blocks = 3 if leaf == "in_proj_weight" else None
        return _by_size(param, min_dim, "attention projection", heads=blocks)
    if isinstance(module, nn.RNNBase):
        if leaf.startswith("weight_hr"):
            return _by_size(param, min_dim, "recurrent projection")
        blocks = {"LSTM": 4, "GRU": 3}.get(module.mode)
        return _by_size(param, min_dim, "recurrent gates", heads=blocks)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and leaf == "weight":
        verdict = _by_size(param, min_dim, "linear (Conv1D)")
        return verdict and replace(verdict, transposed=True)
    return None


def question(unknown: Mapping[str, nn.Parameter]) -> str:
    """The error for parameters that `classify` cannot place, by name.

    It is about the first that may be a batch of matrices: "muon" would take that for one matrix.
    """
    stacks = [name for name, param in unknown.items() if param.ndim == 3 and len(param) > 1]
    names = list(dict.fromkeys([*stacks, *unknown]))
    shown = ", ".join(f"`{name}`" for name in names[:8])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"cannot tell whether {shown}{more} should be updated by Muon; " + _TELL.format(
        pattern=names[0].replace(".", r"\."),
        choice="muon_stacked" if stacks else "muon",
        stacked=_STACKED if stacks else "",
    )


def _by_size(
    param: nn.Parameter, min_dim: int, reason: str, heads: int | None = None
) -> Verdict | None:
    if param.ndim != 2:
        return None
    if min(param.shape[0] // (heads or 1), param.shape[1]) < min_dim:
        return Verdict(role="matrix", reason=f"smaller than {min_dim}")
    return Verdict(role="hidden", reason=reason, heads=heads)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or isinstance(
        getattr(module, "num_embeddings", None), int
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
    )


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") or isinstance(
        module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm
    )
