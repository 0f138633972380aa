"""A model as a folder: `config.json` beside `model.safetensors`; loading also takes a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matilda_model.config import ModelConfig
from matilda_model.model import Transformer
from matilda_model.tensor_file import read_tensors, write_tensors

_FORMAT = "matilda-model/1"
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # what they add to a parameter's name


def save_pretrained(model: Transformer, folder: str | Path) -> Path:
    """Write config and weights to `folder`, made if missing; the folder.

    What `torch.compile`, DDP or activation checkpointing wrapped, as a whole or block by block, is
    saved as the model it was made from. Raises ValueError for one that is sharded over ranks.
    """
    folder = Path(folder)
    model = unwrapped(model)
    weights = whole_weights(model)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", weights)
    description = {"format": _FORMAT, "model": dataclasses.asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    return folder


def load_pretrained(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> Transformer:
    """The model in `path`, in evaluation mode.

    `path` is a folder of `save_pretrained`, a training run (its newest committed, healthy
    checkpoint) or one `step-…` checkpoint of a run. Raises ValueError, naming what is wrong, when
    it is none of these, when a checkpoint's weights do not have the SHA-256 of its manifest, and
    when weights and config do not fit together.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        config = _read_json(path / "config.json")
        if config.get("format") != _FORMAT:
            raise ValueError(f"{str(path / 'config.json')!r} does not say `format` {_FORMAT!r}")
        tensors = read_tensors(path / "model.safetensors")
        return _build(config.get("model"), tensors, path, device, compute_dtype)
    checkpoint = _newest_checkpoint(path) if (path / "run.json").is_file() else path
    run_file = checkpoint.parent.parent / "run.json"
    if not ((checkpoint / "COMMIT").is_file() and run_file.is_file()):
        raise ValueError(
            f"{str(path)!r} is no saved model, run or checkpoint of a run: give a folder with "
            "`config.json` or `run.json`, or a `step-…` folder inside a run's `checkpoints`"
        )
    section = _read_json(run_file).get("config", {}).get("model")
    return _build(section, _checkpoint_tensors(checkpoint), checkpoint, device, compute_dtype)


def _checkpoint_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a run's checkpoint, from as many files as its manifest spreads them over."""
    manifest = _read_json(checkpoint / "MANIFEST.json")
    tensors: dict[str, Tensor] = {}
    try:
        files = {name: manifest["files"][name] for name in manifest["state"]["model"]["tensors"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the manifest of {str(checkpoint)!r} lists no weights of a model"
        ) from error
    for name, entry in files.items():
        path = checkpoint / name
        if not _is_intact(path.read_bytes() if path.is_file() else b"", entry):
            raise ValueError(
                f"{str(path)!r} is damaged or missing: its SHA-256 is not the manifest's"
            )
        tensors |= read_tensors(path)
    return tensors


def _is_intact(raw: bytes, entry: dict[str, Any]) -> bool:
    """Whether a file is what a manifest says: as a whole, or its header and each of its tensors."""
    if "sha256" in entry:
        return hashlib.sha256(raw).hexdigest() == str(entry["sha256"])
    header = int(entry["header_size"])
    pieces = [(raw[:header], entry["header_sha256"])]
    for tensor in entry["tensors"].values():
        start, stop = tensor["offsets"]
        pieces.append((raw[header + start : header + stop], tensor["sha256"]))
    return len(raw) == int(entry["size"]) and all(
        hashlib.sha256(piece).hexdigest() == digest for piece, digest in pieces
    )


def _newest_checkpoint(run: Path) -> Path:
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        if (folder / "COMMIT").is_file():
            health = _read_json(folder / "MANIFEST.json").get("health", {})
            if health.get("healthy", True):
                return folder
    raise ValueError(f"the run {str(run)!r} holds no committed, healthy checkpoint yet")


def _build(
    section: Any,
    tensors: dict[str, Tensor],
    where: Path,
    device: str | torch.device,
    compute_dtype: torch.dtype,
) -> Transformer:
    if not isinstance(section, dict):
        raise ValueError(f"the config of {str(where)!r} has no section `model`")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(section) - known)
    if unknown:
        raise ValueError(
            f"the config of {str(where)!r} has the unknown field {unknown[0]!r}: it was written by "
            "another version of matilda-model"
        )
    try:
        # without initial values, which would be drawn from the caller's generator for nothing
        with torch.device("meta"):
            model = Transformer(ModelConfig(**section))
    except ValueError as error:
        raise ValueError(f"the config of {str(where)!r} is wrong: {error}") from error
    expected = dict(model.named_parameters())
    different = sorted(set(expected) ^ set(tensors))
    if different:
        raise ValueError(f"{str(where)!r}: config and weights disagree on {different[0]!r}")
    for name, parameter in expected.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{str(where)!r}: {name!r} has shape {tuple(tensors[name].shape)!r}, the "
                f"config asks for {tuple(parameter.shape)!r}"
            )
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    model.compute_dtype = compute_dtype
    return model.to(device).eval()


def unwrapped(model: nn.Module) -> Transformer:
    """The model that `torch.compile` or DDP, one or both, hold. Raises ValueError without one."""
    inner: Any = model
    while not isinstance(inner, Transformer):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise ValueError(f"`model` must be a `Transformer`, not a {type(model).__name__!r}")
    return inner


def whole_weights(model: Transformer) -> dict[str, Tensor]:
    """Every parameter by its own name, whatever wraps its block."""
    weights = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): parameter.detach()
        for name, parameter in model.named_parameters()
    }
    for name, weight in weights.items():
        if hasattr(weight, "full_tensor"):
            raise ValueError(
                f"`{name}` is sharded over ranks: load the full state into a plain `Transformer` "
                "and save that"
            )
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object")
    return value
