"""Optimizer state from other Muon implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


class _Layout(NamedTuple):
    momentum: str
    sums: bool  # classical momentum M ← βM + G, which is 1/(1-β) times the average kept here
    beta: str
    first: str
    second: str


_LAYOUTS = {
    "torch": _Layout("momentum_buffer", False, "momentum", "exp_avg", "exp_avg_sq"),
    "keller": _Layout("momentum_buffer", False, "momentum", "exp_avg", "exp_avg_sq"),
    "moonlight": _Layout("momentum_buffer", True, "momentum", "moment1", "moment2"),
    "dion": _Layout("momentum", True, "mu", "momentum", "variance"),
}


def convert_state(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    *,
    source: str,
    params: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """A state for `optimizer` from the `state_dict` of another implementation.

    Momentum is kept here as an average; sums (Moonlight's, dion's) are multiplied by 1 - β of the
    source's group. The next step then goes the same way as the source's would, up to rounding.
    Hyper-parameters stay this optimizer's; `convert_lr` translates them.

    Args:
        optimizer: a `Muon` whose groups say which parameters take which algorithm.
        state_dict: of `torch.optim.Muon` or AdamW ("torch"), KellerJordan/Muon ("keller"),
            Moonlight's `toy_train.py` ("moonlight") or microsoft/dion's Muon ("dion").
        params: the parameters in the order that the source held them, over all its groups; None
            takes this optimizer's order. KellerJordan's distributed classes sort theirs by size.

    Returns:
        What `optimizer.load_state_dict` takes.

    Raises:
        ValueError: unknown `source`, another number of parameters, or a missing or misshapen state.
    """
    if source not in _LAYOUTS:
        raise ValueError(f"`source` must be one of {', '.join(map(repr, _LAYOUTS))}: {source!r}")
    layout = _LAYOUTS[source]
    own = optimizer.state_dict()
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    order = ours if params is None else list(params)
    ids = [(i, group) for group in state_dict["param_groups"] for i in group["params"]]
    if len(ids) != len(order) or {id(p) for p in order} != {id(p) for p in ours}:
        raise ValueError(
            f"the source state holds {len(ids)} parameters and `params` names {len(order)} of this "
            f"optimizer's {len(ours)}; give `params` in the source's order"
        )
    found = {id(p): entry for p, entry in zip(order, ids, strict=True)}
    state: dict[int, dict[str, Any]] = {}
    for group, saved in zip(optimizer.param_groups, own["param_groups"], strict=True):
        for param, own_id in zip(group["params"], saved["params"], strict=True):
            source_id, source_group = found[id(param)]
            values = state_dict["state"].get(source_id)
            if not values:
                continue
            if group["algorithm"] == "muon":
                buffer = _tensor(values, layout.momentum, param)
                factor = 1.0 - float(source_group[layout.beta]) if layout.sums else 1.0
                state[own_id] = {"momentum_buffer": buffer * factor}
            else:
                step = values.get("step", values.get("step_dev", source_group.get("step")))
                if step is None:
                    raise ValueError("the source state holds no step count for an AdamW parameter")
                state[own_id] = {
                    "step": torch.as_tensor(step, dtype=torch.float32),
                    "exp_avg": _tensor(values, layout.first, param),
                    "exp_avg_sq": _tensor(values, layout.second, param),
                }
    return {"state": state, "param_groups": own["param_groups"]}


def _tensor(values: dict[str, Any], key: str, param: Tensor) -> Tensor:
    value = values.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(f"the source state has no `{key}`; it holds {sorted(values)!r}")
    if value.shape != param.shape:
        raise ValueError(
            f"the source's `{key}` has shape {tuple(value.shape)!r} where this parameter has "
            f"{tuple(param.shape)!r}; give `params` in the source's order"
        )
    return value.detach().float()
