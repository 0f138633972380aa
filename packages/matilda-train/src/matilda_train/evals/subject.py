"""What is evaluated: a run's checkpoint or a folder of transformers, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matilda_data import load_tokenizer
from matilda_model import Transformer, count_params, load_pretrained
from matilda_train.evals.encoding import DatasetCoder, TextCoder
from matilda_train.evals.scoring import ScoredModel, ScoredTransformer
from matilda_train.hardware import choose_device, choose_dtype
from matilda_train.run_dir import RunDir
from matilda_train.trained_model import load_trained

__all__ = ["Subject", "open_checkpoint", "open_folder", "open_run"]


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    name: str
    model: ScoredModel
    coder: TextCoder
    dtype: str
    """In which it computes."""
    run_dir: Path | None = None
    origin: dict[str, Any] | None = None
    """Of a run's checkpoint: `run_id`, `step`, `tokens` (trained on), `data_id`, `parameters`."""
    batch_tokens: int | None = None


def open_run(run_dir: Path, *, step: int | None = None, device: str = "auto") -> Subject:
    """A run's newest healthy checkpoint, or the one at `step`.

    Raises `ValueError` when there is no run or no checkpoint yet, `CheckpointError` when none is
    valid.
    """
    trained = load_trained(run_dir, step=step, device=device)
    return _subject(run_dir, trained.step, trained.model)


def open_checkpoint(folder: Path, *, device: str = "auto") -> Subject:
    """One `step-…` folder of a run's checkpoints; `ValueError` when it is none or damaged."""
    run_dir = folder.resolve().parent.parent
    number = folder.resolve().name.removeprefix("step-").partition("-")[0]
    if not number.isdigit() or not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no `step-…` folder of a run's checkpoints.")
    config = RunDir.config(run_dir)
    where = choose_device(device, field="--device")
    dtype = choose_dtype(config.train.dtype, where)
    model = load_pretrained(folder.resolve(), device=where, compute_dtype=dtype)
    return _subject(run_dir, int(number), model)


def open_folder(folder: Path, *, device: str = "auto", trust_remote_code: bool = False) -> Subject:
    """A folder of transformers; errors as `load_folder`'s."""
    from matilda_train.evals.transformers_folder import GPU_BATCH_TOKENS, load_folder

    where = choose_device(device, field="--device")
    dtype = choose_dtype("auto", where)
    model, coder = load_folder(
        folder,
        device=where,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    batch_tokens = GPU_BATCH_TOKENS if where.type == "cuda" else None
    return Subject(folder.name, model, coder, _name(dtype), batch_tokens=batch_tokens)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _subject(run_dir: Path, step: int, model: Transformer) -> Subject:
    config, description = RunDir.config(run_dir), RunDir.read(run_dir)
    return Subject(
        name=f"{run_dir.name} at step {step:,}",
        model=ScoredTransformer(model),
        coder=DatasetCoder(load_tokenizer(config.data.tokenizer)),
        dtype=_name(model.compute_dtype),
        run_dir=run_dir,
        origin={
            "run_id": description["run_id"],
            "step": step,
            "tokens": config.plan.tokens(step),
            "data_id": description["data_id"],
            "parameters": count_params(config.model),
        },
    )
