"""The training loop of Matilda: one config in, one verifiable run out.

Names load on first use, so that `matilda_train.stop_signals` can be imported, and signals handled,
before the seconds-long import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matilda_train.config import (
        CkptConfig,
        DataConfig,
        EvalConfig,
        LogConfig,
        OptimConfig,
        RunConfig,
        TrainConfig,
    )
    from matilda_train.config_load import config_from_dict, config_to_dict, load_config
    from matilda_train.console import Display, SilentDisplay, TerminalDisplay
    from matilda_train.decay import DecayRun, open_decay
    from matilda_train.duration import Duration
    from matilda_train.errors import TrainingDivergedError
    from matilda_train.evaluation import Evaluation, evaluate
    from matilda_train.loop import train
    from matilda_train.loop_state import TrainResult
    from matilda_train.preflight import PreflightReport, estimate_seconds, run_preflight
    from matilda_train.report import draw_loss, write_report
    from matilda_train.run_dir import RunDir
    from matilda_train.sample import complete_text
    from matilda_train.stop_signals import EXIT_PREEMPTED, StopRequest
    from matilda_train.time_account import Goodput, goodput
    from matilda_train.trained_model import load_run_model

__all__ = [
    "EXIT_PREEMPTED",
    "CkptConfig",
    "DataConfig",
    "DecayRun",
    "Display",
    "Duration",
    "EvalConfig",
    "Evaluation",
    "Goodput",
    "LogConfig",
    "OptimConfig",
    "PreflightReport",
    "RunConfig",
    "RunDir",
    "SilentDisplay",
    "StopRequest",
    "TerminalDisplay",
    "TrainConfig",
    "TrainResult",
    "TrainingDivergedError",
    "complete_text",
    "config_from_dict",
    "config_to_dict",
    "draw_loss",
    "estimate_seconds",
    "evaluate",
    "goodput",
    "load_config",
    "load_run_model",
    "open_decay",
    "run_preflight",
    "train",
    "write_report",
]

_HOME = {
    "config": (
        "CkptConfig",
        "DataConfig",
        "EvalConfig",
        "LogConfig",
        "OptimConfig",
        "RunConfig",
        "TrainConfig",
    ),
    "config_load": ("config_from_dict", "config_to_dict", "load_config"),
    "console": ("Display", "SilentDisplay", "TerminalDisplay"),
    "decay": ("DecayRun", "open_decay"),
    "duration": ("Duration",),
    "errors": ("TrainingDivergedError",),
    "evaluation": ("Evaluation", "evaluate"),
    "loop": ("train",),
    "loop_state": ("TrainResult",),
    "preflight": ("PreflightReport", "estimate_seconds", "run_preflight"),
    "report": ("draw_loss", "write_report"),
    "run_dir": ("RunDir",),
    "sample": ("complete_text",),
    "stop_signals": ("EXIT_PREEMPTED", "StopRequest"),
    "time_account": ("Goodput", "goodput"),
    "trained_model": ("load_run_model",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
