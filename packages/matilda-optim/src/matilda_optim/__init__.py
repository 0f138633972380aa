"""Muon + AdamW in one optimizer, explicit parameter groups and closed-form schedules.

Names load on first use: they need torch, whose import takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matilda_optim.coefficients import PRESETS, resolve_coefficients
    from matilda_optim.convert import convert_state
    from matilda_optim.groups import describe_groups, param_groups
    from matilda_optim.learning_rate import convert_lr, lr_ratio
    from matilda_optim.muon import Muon
    from matilda_optim.newton_schulz import orthogonalize
    from matilda_optim.qk_clip import qk_clip_
    from matilda_optim.scheduler import BatchRamp, GroupScheduler
    from matilda_optim.schedules import constant, cosine, linear_to_zero, momentum_warmup, wsd

__all__ = [
    "PRESETS",
    "BatchRamp",
    "GroupScheduler",
    "Muon",
    "constant",
    "convert_lr",
    "convert_state",
    "cosine",
    "describe_groups",
    "linear_to_zero",
    "lr_ratio",
    "momentum_warmup",
    "orthogonalize",
    "param_groups",
    "qk_clip_",
    "resolve_coefficients",
    "wsd",
]

_HOME = {
    "coefficients": ("PRESETS", "resolve_coefficients"),
    "convert": ("convert_state",),
    "groups": ("describe_groups", "param_groups"),
    "learning_rate": ("convert_lr", "lr_ratio"),
    "muon": ("Muon",),
    "newton_schulz": ("orthogonalize",),
    "qk_clip": ("qk_clip_",),
    "scheduler": ("BatchRamp", "GroupScheduler"),
    "schedules": ("constant", "cosine", "linear_to_zero", "momentum_warmup", "wsd"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
