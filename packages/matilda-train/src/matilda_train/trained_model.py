"""A run's model as one of its checkpoints holds it, with what is known of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matilda_ckpt import Checkpointer
from matilda_data import Tokenizer, load_tokenizer
from matilda_model import Transformer
from matilda_train.config import RunConfig
from matilda_train.hardware import choose_device, choose_dtype
from matilda_train.lost_checkpoints import describe_lost
from matilda_train.run_dir import RunDir

__all__ = ["TrainedModel", "load_run_model", "load_trained"]


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """Weights of one step of a run."""

    model: Transformer
    """On the device that was asked for, in evaluation mode and the run's own compute dtype."""

    step: int
    config: RunConfig
    run: dict[str, Any]
    """The run's `run.json`."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return load_tokenizer(self.config.data.tokenizer)


def load_trained(
    run_dir: str | Path, *, step: int | None = None, device: str = "auto"
) -> TrainedModel:
    """A run's newest healthy checkpoint, or the one at `step`; the run is only read.

    A newer one that cannot be used is named on the log, which is standard error by default. Raises
    `ValueError` when there is no run or no checkpoint yet, `CheckpointError` when none is valid or
    those that the run has saved are gone.
    """
    config, run = RunDir.config(run_dir), RunDir.read(run_dir)
    where = choose_device(device, field="--device")
    checkpoints = Checkpointer(Path(run_dir) / "checkpoints", read_only=True)
    restored = checkpoints.restore({"model": None}, step=step)
    if restored is None:
        describe_lost(Path(run_dir), None)
        raise ValueError(f"The run {str(run_dir)!r} holds no checkpoint yet; train it first.")
    for skip in restored.skipped:
        logger.warning(
            "the checkpoint of step %s is passed over for that of step %s: %s",
            *(f"{skip.step:,}", f"{restored.step:,}", skip.reason),
        )
    state: Any = restored.state
    model = Transformer(config.model)
    model.load_state_dict(state["model"])
    model.compute_dtype = choose_dtype(config.train.dtype, where)
    return TrainedModel(model.to(where).eval(), restored.step, config, run)


def load_run_model(
    run_dir: str | Path, *, step: int | None = None, device: str = "auto"
) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a run; errors as `load_trained`'s."""
    trained = load_trained(run_dir, step=step, device=device)
    return trained.model, trained.tokenizer
