"""Muon + AdamW in one optimizer, explicit parameter groups and closed-form schedules."""

from matilda_optim.coefficients import PRESETS, resolve_coefficients
from matilda_optim.convert import convert_state
from matilda_optim.groups import describe_groups, param_groups
from matilda_optim.learning_rate import convert_lr, lr_ratio
from matilda_optim.muon import Muon
from matilda_optim.orthogonalize import orthogonalize
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
