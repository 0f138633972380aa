"""Muon + AdamW in one optimizer, explicit parameter groups and closed-form schedules."""

from matilda_optim.coefficients import PRESETS, resolve_coefficients
from matilda_optim.groups import describe_groups, param_groups
from matilda_optim.learning_rate import convert_lr, lr_ratio
from matilda_optim.muon import Muon
from matilda_optim.orthogonalize import orthogonalize
from matilda_optim.schedules import constant, cosine, linear_to_zero, wsd

__all__ = [
    "PRESETS",
    "Muon",
    "constant",
    "convert_lr",
    "cosine",
    "describe_groups",
    "linear_to_zero",
    "lr_ratio",
    "orthogonalize",
    "param_groups",
    "resolve_coefficients",
    "wsd",
]
