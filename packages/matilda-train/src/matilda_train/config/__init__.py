"""What a run is: one frozen, validated value per config section.

A config file is JSON with the sections `model`, `optim`, `data`, `train`, `eval`, `ckpt` and
`log`; `matilda_train.load_config` turns it into a `RunConfig`. Every field states its unit and
default below it, and is checked where it is defined.
"""

from __future__ import annotations

from matilda_train.config.ckpt import CkptConfig
from matilda_train.config.data import DataConfig
from matilda_train.config.eval import EvalConfig
from matilda_train.config.log import LogConfig
from matilda_train.config.optim import OptimConfig
from matilda_train.config.run import RunConfig
from matilda_train.config.train import TrainConfig

__all__ = [
    "CkptConfig",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
]
