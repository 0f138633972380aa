"""Weights & Biases as a mirror of `metrics.jsonl`, imported only when asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from matilda_train.config import LogConfig

__all__ = ["WandbMirror", "require_wandb"]


def require_wandb() -> None:
    """Raise `ValueError` when wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "`log.wandb` is true, but wandb is not installed; install it with `pip install "
            "'matilda-train[wandb]'`, or set `log.wandb=false`."
        )


class WandbMirror:
    """Sends metrics rows to one W&B run whose id is the run's own, over all its restarts."""

    def __init__(self, config: LogConfig, run: Mapping[str, Any]) -> None:
        require_wandb()
        import wandb

        self._run = wandb.init(
            project=config.wandb_project,
            id=run["run_id"],
            resume="allow",
            config={"config_sha256": run["config_sha256"], **run["config"]},
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Send one row under its step."""
        values = {name: value for name, value in row.items() if not isinstance(value, str | None)}
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        """Flush and end the W&B run's session."""
        self._run.finish()
