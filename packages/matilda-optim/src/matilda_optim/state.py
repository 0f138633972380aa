"""Optimizer state: where its parameter is; loaded by parameter name, in place, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from matilda_optim.adamw import master_dtype

_LIKE_PARAMETER = ("momentum_buffer", "exp_avg", "exp_avg_sq")
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def follow_parameter(state: dict[str, Any], param: Tensor) -> bool:
    """Moves `state` to the device and precision of `param`; returns whether it was elsewhere."""
    moved = False
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        dtype = master_dtype(param) if key in _LIKE_PARAMETER else value.dtype
        if value.device == param.device and value.dtype == dtype:
            continue
        moved = True
        if value.is_meta:  # no values to move: the optimizer was made before the weights were
            state[key] = torch.zeros_like(value, device=param.device, dtype=dtype)
        else:
            state[key] = value.to(param.device, dtype)
    return moved


def drop_strangers(states: dict[Any, Any], params: Sequence[Tensor], *, replaced: bool) -> None:
    """Drops the states of tensors that are in no group: empty ones, and all if others came in."""
    own = set(map(id, params))
    for key in [k for k in states if isinstance(k, Tensor) and id(k) not in own]:
        if replaced or not states[key]:
            del states[key]


def align_state_dict(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` with its groups and parameters in the order of `groups`.

    Names are compared without what `torch.compile`, activation checkpointing, FSDP1 and DDP put
    into them. Without names on both sides the order is trusted, as torch does. Integer keys that a
    JSON format has turned into strings are accepted. Options that a saved group lacks are taken
    from its own group.

    Raises:
        ValueError: another set of names, or names grouped differently.
    """
    state = {
        int(k) if isinstance(k, str) and k.isdigit() else k: v
        for k, v in state_dict["state"].items()
    }
    saved = [dict(group) for group in state_dict["param_groups"]]
    named = [all(g.get("param_names") for g in side if g["params"]) for side in (groups, saved)]
    ordered = _by_name(groups, saved) if all(named) else saved
    _check_algorithms(groups, ordered)
    for group, other in zip(groups, ordered, strict=False):  # lengths are torch's to compare
        # what the state does not say stays: torch.optim.Muon, for one, knows no `split`
        other.update({key: value for key, value in group.items() if key not in other})
    return {**state_dict, "state": state, "param_groups": ordered}


def _by_name(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups, and the parameters in each, in the order of `groups`."""
    plain = _plain_name if _stay_apart(groups) and _stay_apart(saved) else str
    ours = {plain(name) for g in groups for name in g.get("param_names", ())}
    theirs = {plain(name) for g in saved for name in g.get("param_names", ())}
    if ours != theirs:
        raise ValueError(
            "the state is of other parameters: "
            f"missing {sorted(ours - theirs)[:5]!r}, unexpected {sorted(theirs - ours)[:5]!r}"
        )
    by_names = {frozenset(map(plain, g.get("param_names", ()))): g for g in saved}
    ordered = []
    for group in groups:
        names = group.get("param_names", [])
        match = by_names.get(frozenset(map(plain, names)))
        if match is None:
            raise ValueError(
                f"the state groups its parameters differently: no saved group holds exactly those "
                f"of group {group.get('name', names[:3])!r}; build the groups as they were saved"
            )
        ids = dict(zip(map(plain, match.get("param_names", ())), match["params"], strict=True))
        params = [ids[plain(name)] for name in names]
        ordered.append({**match, "params": params, "param_names": list(names)})
    return ordered


def _plain_name(name: str) -> str:
    """A parameter's name in the model that a wrapper holds."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def _stay_apart(groups: list[dict[str, Any]]) -> bool:
    """Whether names that differ do so without wrappers: a model may hold `x` and `module.x`."""
    names = [name for g in groups for name in g.get("param_names", ())]
    return len(set(map(_plain_name, names))) == len(set(names))


def _check_algorithms(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """A group's state fits only its own algorithm; torch.optim.Muon's groups do not name theirs."""
    for i, (group, other) in enumerate(zip(groups, saved, strict=False)):
        theirs = other.get("algorithm", "muon")
        if theirs != group["algorithm"]:
            raise ValueError(
                f"group {group.get('name', i)!r} is updated by {group['algorithm']!r}, "
                f"but the state holds it as {theirs!r}; build the groups as they were saved"
            )


def check_shapes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Raises ValueError when a saved tensor has another shape than this optimizer's."""
    # lengths are torch's to compare
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for i, (param, saved_id) in enumerate(zip(group["params"], saved["params"], strict=False)):
            values = state_dict["state"].get(saved_id, {})
            for key, target in optimizer.state[param].items():
                shape = torch.as_tensor(values.get(key, target)).shape
                if shape != target.shape:
                    name = (group.get("param_names") or range(len(group["params"])))[i]
                    raise ValueError(
                        f"saved `{key}` has shape {tuple(shape)!r}, "
                        f"parameter {name!r} needs {tuple(target.shape)!r}"
                    )


def restore_in_place(
    optimizer: Optimizer, before: dict[Any, dict[str, Any]], state_dict: dict[str, Any]
) -> None:
    """Copies the saved tensors into those that existed before the load.

    torch casts floating state to the parameter's dtype while loading; reading the original again
    keeps fp32 state of 16-bit parameters, and addresses stay valid for captured graphs.
    """
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for param, saved_id in zip(group["params"], saved["params"], strict=True):
            values = state_dict["state"].get(saved_id, {})
            own = before[param]
            for key, target in own.items():
                if key not in values:
                    target.zero_()
                    continue
                target.copy_(torch.as_tensor(values[key]))
            for key in [k for k in values if k not in own]:  # of options of the saved groups
                own[key] = torch.as_tensor(values[key]).to(param.device, copy=True)
            optimizer.state[param] = own
