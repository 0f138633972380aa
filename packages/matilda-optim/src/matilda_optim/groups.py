"""Parameter groups from a model, and the table that shows them to people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from matilda_optim.classify import Verdict, classify, heads_of, owners_of, question

_OVERRIDES = {
    "muon": Verdict(role="hidden", reason="override"),
    "muon_stacked": Verdict(role="hidden", reason="override, stacked", stacked=True),
    "adamw": Verdict(role="matrix", reason="override"),
    "adamw_no_decay": Verdict(role="vector", reason="override"),
}


def param_groups(
    model: nn.Module,
    *,
    algorithm: str = "muon",
    lr: float,
    weight_decay: float,
    adamw_lr: float | None = None,
    adamw_weight_decay: float | None = None,
    embedding_lr: float | None = None,
    decay_embeddings: bool = True,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "polar_express",
    ns_steps: int = 5,
    ns_dtype: str | None = None,
    adjust_lr_fn: str | None = "match_rms_adamw",
    min_dim: int = 16,
    overrides: Mapping[str, str] | None = None,
    split: Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Sorts every trainable parameter of `model` into exactly one optimizer group.

    Under "muon", hidden matrices (Linear, convolution, attention weights) go to Muon; embeddings
    and what is tied to them, vocabulary-sized heads, routers, matrices thinner than `min_dim`,
    depthwise convolutions, norms, biases and scalars go to AdamW. Under "adamw" all go to AdamW.
    Decay is 0 for parameters of fewer than two dimensions and for norms. A parameter whose module
    is unknown is an error, never a guess.

    Args:
        lr, weight_decay: of the Muon groups; of all groups under "adamw". With the default
            `adjust_lr_fn`, "match_rms_adamw", values tuned for AdamW fit Muon.
        adamw_lr, adamw_weight_decay: of the AdamW groups; None takes `lr`, `weight_decay`.
        embedding_lr: of the "embedding" group; None takes `adamw_lr`.
        decay_embeddings: whether embeddings and the head get decay.
        betas, eps: of AdamW. momentum, nesterov, ns_coefficients, ns_steps, ns_dtype, adjust_lr_fn:
            of Muon, see `Muon`.
        min_dim: matrices with a smaller side than this go to AdamW.
        overrides: regular expression searched in the parameter's name → "muon", "muon_stacked"
            (leading dimension is a batch), "adamw" or "adamw_no_decay". The first match wins.
        split: regular expression → rows of each matrix in a fused weight, e.g.
            `{r"qkv\\.weight": (768, 256, 256)}`.

    Returns:
        Groups for `Muon(…)`, each with `params`, `param_names`, `name`, `algorithm`, `lr`,
        `initial_lr` and its options. Names: "hidden", "embedding", "head", "matrix", "vector";
        fused weights get groups of their own.

    Raises:
        ValueError: an unknown `algorithm` or override, no trainable parameter, a parameter without
            a shape yet, an override that matches nothing, a matrix stored transposed where
            `adjust_lr_fn` tells fan-in from fan-out, or parameters that cannot be classified
            (named, with the override).
    """
    if algorithm not in ("muon", "adamw"):
        raise ValueError(f'`algorithm` must be "muon" or "adamw", got {algorithm!r}')
    verdicts = _verdicts(model, algorithm, min_dim, overrides or {})
    splits = _splits(verdicts, split or {})
    adamw_lr = lr if adamw_lr is None or algorithm == "adamw" else adamw_lr
    if adamw_weight_decay is None or algorithm == "adamw":
        adamw_weight_decay = weight_decay
    muon_options = {
        "momentum": momentum,
        "nesterov": nesterov,
        "ns_coefficients": ns_coefficients,
        "ns_steps": ns_steps,
        "ns_dtype": ns_dtype,
        "adjust_lr_fn": adjust_lr_fn,
    }
    _check_orientation(model, verdicts, adjust_lr_fn)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buckets: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, verdict in verdicts.items():
        rows = splits.get(name)
        heads = None if rows else verdict.heads
        key = (verdict.role, rows, heads, verdict.stacked)
        group = buckets.get(key)
        if group is None:
            muon = verdict.role == "hidden"
            group = {"params": [], "param_names": [], "reasons": []}
            group["name"] = _group_name(verdict, rows)
            group["algorithm"] = "muon" if muon else "adamw"
            group["lr"] = lr if muon else adamw_lr
            if verdict.role == "embedding" and embedding_lr is not None:
                group["lr"] = embedding_lr
            group["lr"], group["initial_lr"] = _own(group["lr"]), _own(group["lr"])
            group["weight_decay"] = weight_decay if muon else adamw_weight_decay
            if verdict.role == "vector" or (
                verdict.role in ("embedding", "head") and not decay_embeddings
            ):
                group["weight_decay"] = 0.0
            if muon:
                group |= muon_options
                group |= {"split": rows, "heads": heads, "stacked": verdict.stacked}
            else:
                group |= {"betas": tuple(betas), "eps": eps}
            buckets[key] = group
        group["params"].append(trainable[name])
        group["param_names"].append(name)
        group["reasons"].append(verdict.reason)
    groups = sorted(buckets.values(), key=lambda g: _ORDER.index(g["name"].split("[")[0]))
    _check_partition(groups, trainable)
    return groups


_ORDER = ["hidden", "matrix", "embedding", "head", "vector"]


def describe_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    """An audit table: each group's algorithm, lr, decay and count, each parameter's reason."""
    lines = []
    total = sum(p.numel() for g in groups for p in g["params"])
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        lines.append(
            f"{group.get('name', 'group')}: {group.get('algorithm', 'muon')}, "
            f"lr {float(group['lr']):.3g}, weight decay {float(group['weight_decay']):.3g}, "
            f"{len(group['params'])} tensors, {count:,} parameters ({count / max(total, 1):.1%})"
        )
        lines += _table(group)
    lines.append(f"total: {total:,} parameters in {len(groups)} groups")
    return "\n".join(lines)


def _table(group: Mapping[str, Any]) -> list[str]:
    """One line per pattern of names, numbers folded to `*`, so that layers share a line."""
    names = group.get("param_names") or [str(i) for i in range(len(group["params"]))]
    reasons = group.get("reasons") or [""] * len(names)
    folded: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, param, reason in zip(names, group["params"], reasons, strict=True):
        key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), tuple(param.shape), reason)
        folded[key] = folded.get(key, 0) + 1
    width = max((len(key[0]) for key in folded), default=0)
    return [
        f"  {pattern:<{width}}  {'×'.join(map(str, shape)) or 'scalar':>12}  ×{count:<3} {reason}"
        for (pattern, shape, reason), count in folded.items()
    ]


def _verdicts(
    model: nn.Module, algorithm: str, min_dim: int, overrides: Mapping[str, str]
) -> dict[str, Verdict]:
    for pattern, choice in overrides.items():
        _check_pattern("overrides", pattern)
        if choice not in _OVERRIDES:
            raise ValueError(
                f"the override of {pattern!r} is {choice!r}; "
                f"use one of {', '.join(map(repr, _OVERRIDES))}"
            )
    owners = owners_of(model)
    heads = heads_of(model)
    verdicts: dict[str, Verdict] = {}
    unknown: dict[str, nn.Parameter] = {}
    used: set[str] = set()
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if isinstance(param, nn.UninitializedParameter):
            raise ValueError(f"`{name}` has no shape yet: run a batch through the model first")
        override = next((p for p in overrides if re.search(p, name)), None)
        verdict: Verdict | None
        if override is not None:
            used.add(override)
            verdict = _OVERRIDES[overrides[override]]
        else:
            verdict = classify(
                name,
                param,
                owners[id(param)],
                heads=heads,
                min_dim=min_dim,
            )
        if algorithm == "adamw" and (verdict is None or verdict.role == "hidden"):
            verdict = Verdict(role="matrix", reason="AdamW for all")
        if verdict is None:
            unknown[name] = param
        else:
            verdicts[name] = verdict
    if unknown:
        raise ValueError(question(unknown))
    if not verdicts:
        raise ValueError("the model has no trainable parameter")
    unused = [p for p in overrides if p not in used]
    if unused:
        raise ValueError(
            f"the override {unused[0]!r} matches no trainable parameter's name that an earlier "
            "override has not taken"
        )
    return verdicts


def _own(lr: Any) -> Any:
    """A learning rate that is a tensor is written in place: each group needs one of its own."""
    return lr.clone() if isinstance(lr, Tensor) else lr


def _check_orientation(
    model: nn.Module, verdicts: Mapping[str, Verdict], adjust_lr_fn: str | None
) -> None:
    """A ratio of rows to columns would be upside down for a matrix that is stored transposed."""
    if adjust_lr_fn == "match_rms_adamw":
        return
    for name, verdict in verdicts.items():
        if verdict.transposed and verdict.role == "hidden":
            rows, cols = model.get_parameter(name).shape
            if rows != cols:
                raise ValueError(
                    f"`{name}` is stored as (fan-in, fan-out), which `adjust_lr_fn` "
                    f'{adjust_lr_fn!r} would take for the reverse; use "match_rms_adamw"'
                )


def _check_pattern(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{option}` names parameters by regular expressions, which {pattern!r} is not: {error}"
        ) from error


def _splits(
    verdicts: Mapping[str, Verdict], split: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    rows: dict[str, tuple[int, ...]] = {}
    for pattern, sizes in split.items():
        _check_pattern("split", pattern)
        if isinstance(sizes, str) or not isinstance(sizes, Iterable):
            raise ValueError(
                f"`split` of {pattern!r} must list the rows of each matrix, such as (64, 32, 32), "
                f"not {sizes!r}"
            )
        matched = [n for n, v in verdicts.items() if v.role == "hidden" and re.search(pattern, n)]
        if not matched:
            raise ValueError(f"`split` {pattern!r} matches no parameter that Muon updates")
        rows |= {name: tuple(int(size) for size in sizes) for name in matched}
    return rows


def _group_name(verdict: Verdict, rows: tuple[int, ...] | None) -> str:
    if rows is not None:
        return f"{verdict.role}[split {'+'.join(map(str, rows))}]"
    if verdict.heads is not None:
        return f"{verdict.role}[heads {verdict.heads}]"
    return f"{verdict.role}[stacked]" if verdict.stacked else verdict.role


def _check_partition(
    groups: Sequence[Mapping[str, Any]], trainable: Mapping[str, nn.Parameter]
) -> None:
    seen = [name for group in groups for name in group["param_names"]]
    for name in trainable:
        if seen.count(name) != 1:
            raise AssertionError(f"`{name}` is in {seen.count(name)} groups")
