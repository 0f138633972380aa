"""Autopsies: what a bad step's batch was, and which module it broke first.

A step whose loss or gradient is not finite, or spikes, leaves a bundle in the run directory:

autopsies/step-00000007-nonfinite/
    autopsy.json      figures, first offenders, samples, config; what `apps/replay.py` reads
    tokens.npy        uint16[samples, sequence + 1], the whole batch
    documents.jsonl   a row for each run of tokens of one document
    rng.json          state of the random number generators

The batch is run again without torch.compile, a sequence at a time, with hooks on every module. A
vetoed step left the weights as they were before it, so what broke then breaks again; if nothing
does, the fault was not in weights and data, and the bundle says so.
"""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from matilda_ckpt import RngState
from matilda_data import batch_sha256
from matilda_model import Transformer
from matilda_train.config import RunConfig
from matilda_train.config_load import config_to_dict
from matilda_train.data_source import TokenStream
from matilda_train.guards import StepGuard, Verdict
from matilda_train.trace import batch_documents

__all__ = ["Autopsies", "Examination", "examine_sequence"]

MOST_NAMED = 10


@dataclass
class Examination:
    """One sequence, forth and back, without torch.compile."""

    loss: float = math.nan
    activation_rms: dict[str, float] = field(default_factory=dict)
    """RMS of each module's output by its name, in the order in which they finish: deepest first."""
    grad_norm: dict[str, float] = field(default_factory=dict)
    """Norm of each parameter's gradient by its name, in the order of the model."""

    @property
    def first_bad_module(self) -> str | None:
        """The module whose output was not finite first."""
        return next((n for n, rms in self.activation_rms.items() if not math.isfinite(rms)), None)

    @property
    def first_bad_parameter(self) -> str | None:
        """The parameter of lowest depth whose gradient is not finite."""
        return next((n for n, norm in self.grad_norm.items() if not math.isfinite(norm)), None)

    @property
    def finite(self) -> bool:
        """Whether nothing was found."""
        bad = self.first_bad_module or self.first_bad_parameter
        return bad is None and math.isfinite(self.loss)


def examine_sequence(model: Transformer, tokens: NDArray[np.uint16], seq_len: int) -> Examination:
    """Loss, activations and gradients of `model` on one sample, uint16[T + 1].

    `seq_len` divides T; the sample is cut into parts of it. Gradients of the model are not touched.
    """
    inputs, targets = _cut(model, tokens, seq_len)
    found = Examination()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    eager = torch.compiler.set_stance("force_eager")
    with _recorded(model, found.activation_rms), model.norms_apart(), eager:
        loss = model(inputs, targets).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found.loss = float(loss.detach())
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            found.grad_norm[name] = float(torch.linalg.vector_norm(gradient.float()))
    return found


def _cut(model: Transformer, tokens: NDArray[np.uint16], seq_len: int) -> tuple[Tensor, Tensor]:
    ids = torch.from_numpy(tokens.astype(np.int64)).to(model.embed.weight.device)
    return ids[:-1].reshape(-1, seq_len), ids[1:].reshape(-1, seq_len)


@contextmanager
def _recorded(model: nn.Module, rms: dict[str, float]) -> Iterator[None]:
    """Fill `rms` with that of every module's output while the block runs the model."""

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, tuple):  # a block's second result helps the next one
                output = output[0]
            if isinstance(output, Tensor):
                rms[name] = float(output.detach().float().square().mean().sqrt())

        return record

    handles = [m.register_forward_hook(hook_of(name)) for name, m in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Autopsies:
    """Writes the bundles of a run, at most `log.autopsies` of them."""

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        guard: StepGuard,
        stream: TokenStream,
        note: Callable[[str], None],
    ) -> None:
        """`note` is told of every bundle, in one line."""
        self._folder = run_dir / "autopsies"
        self._config = config
        self._guard = guard
        self._stream = stream
        self._note = note

    def examine(
        self,
        step: int,
        batch_hash: str,
        verdict: Verdict,
        model: Transformer,
        rollbacks: Sized,
    ) -> Path | None:
        """Write the bundle of `step`, counted from 1, that `verdict` objects to.

        `batch_hash` is that of all batches up to it, `model` whole and as the guard left it,
        `rollbacks` those that the run has behind it. Returns the bundle, or None where there are
        enough or it could not be written: an autopsy never ends a run.
        """
        bundle = self._folder / f"step-{step:08d}-{verdict.objection}"
        written = list(self._folder.glob("step-*")) if self._folder.is_dir() else []
        if bundle.exists() or len(written) >= self._config.log.autopsies:
            return None
        temporary = bundle.with_name(f".{bundle.name}.tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self._write(temporary, step, batch_hash, verdict, model, len(rollbacks))
            temporary.replace(bundle)
        except (OSError, RuntimeError, ValueError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self._note(f"no autopsy of step {step:,}: {error}")
            return None
        self._note(f"autopsy of step {step:,}: {bundle}")
        return bundle

    def _write(
        self,
        folder: Path,
        step: int,
        batch_hash: str,
        verdict: Verdict,
        model: Transformer,
        rollbacks: int,
    ) -> None:
        plan = self._config.plan
        first, count = plan.samples(step - 1), plan.batch_size(step - 1)
        windows = self._stream.windows(first, count)
        np.save(folder / "tokens.npy", windows)
        with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
            for row in batch_documents(self._stream, first, count):
                file.write(json.dumps(row) + "\n")
        (folder / "rng.json").write_text(json.dumps(_plain(RngState().state_dict())))
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        norms = dict(zip(names, self._guard.grad_norms.tolist(), strict=True))
        found = _find_nonfinite if verdict.objection == "nonfinite" else _compare_sequences
        report = {
            "format": "matilda-autopsy/1",
            "step": step,
            "reason": verdict.objection,
            **verdict.figures(),
            "weights": "before the update" if verdict.skipped else "after the update",
            "first_sample": first,
            "samples": count,
            "batch_sha256": batch_hash,
            "tokens_sha256": batch_sha256(windows),
            "rollbacks": rollbacks,
            "data_id": self._stream.data_id,
            "nonfinite_gradients": [n for n, v in norms.items() if not math.isfinite(v)],
            "largest_gradients": dict(_largest(norms)),
            "rerun": found(model, windows, plan.seq_len(step - 1), first),
            "config": config_to_dict(self._config),
        }
        text = json.dumps(_plain(report), indent=2, allow_nan=False)
        with (folder / "autopsy.json").open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())


def _find_nonfinite(
    model: Transformer, windows: NDArray[np.uint16], seq_len: int, first: int
) -> dict[str, Any]:
    """The first sequence that is not finite, and where in the model it ceases to be."""
    for row, tokens in enumerate(windows):
        found = examine_sequence(model, tokens, seq_len)
        if not found.finite:
            return {
                "outcome": "not finite again",
                "sample": first + row,
                "loss_nats": found.loss,
                "first_module": found.first_bad_module,
                "first_parameter": found.first_bad_parameter,
            }
    return {
        "outcome": "finite: no single sequence is at fault, so suspect a sum over many of them, "
        "the device, or what the ranks exchanged"
    }


def _compare_sequences(
    model: Transformer, windows: NDArray[np.uint16], seq_len: int, first: int
) -> dict[str, Any]:
    """The sequence of highest loss, and where it is furthest from the one of median loss."""
    eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), model.norms_apart(), eager:
        losses = [float(model(*_cut(model, tokens, seq_len)).loss) for tokens in windows]
    order = sorted(range(len(losses)), key=losses.__getitem__)
    worst, typical = order[-1], order[len(order) // 2]
    one, other = (examine_sequence(model, windows[row], seq_len) for row in (worst, typical))
    return {
        "outcome": "the sequence of highest loss against the one of median loss",
        "sample": first + worst,
        "loss_nats": losses[worst],
        "median_loss_nats": statistics.median(losses),
        "losses_nats": losses,
        "activation_rms_ratio": dict(_largest(_ratios(one.activation_rms, other.activation_rms))),
        "gradient_norm_ratio": dict(_largest(_ratios(one.grad_norm, other.grad_norm))),
    }


def _ratios(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: value / other[name] for name, value in one.items() if other.get(name)}


def _largest(values: dict[str, float]) -> list[tuple[str, float]]:
    finite = [(name, value) for name, value in values.items() if math.isfinite(value)]
    return sorted(finite, key=lambda item: -item[1])[:MOST_NAMED]


def _plain(value: Any) -> Any:
    """`value` as JSON: tensors as base64 of their bytes, nan and inf as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        raw = value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return {"dtype": str(value.dtype), "base64": base64.b64encode(raw).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
