"""nanoGPT and nanochat as `time_to_loss.py` trains them: their model, optimizer and schedule code.

Model and optimizer are imported from the peers' checkouts; learning rates, decay and momentum over
the steps come from the functions in their training scripts, compiled from the source as it stands
there. What is written here is what their loops do with them, and the recipe's constants, which are
those scripts' defaults.

Their batches of half a million tokens are for runs of many thousand steps, and a few minutes make a
few hundred: a recipe of `time_to_loss_systems.py` gives them smaller ones.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import math
import sys
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from time_to_loss_systems import Recipe
from torch import Tensor, nn

__all__ = ["FOLDERS", "PEERS", "Peer", "Shape", "functions_of"]


@dataclass(frozen=True)
class Shape:
    """What all systems share."""

    vocab_size: int
    seq_len: int
    quick: bool


class Peer(ABC):
    """One system: built for `steps` steps, then stepped with micro-batches of windows."""

    own_batch: ClassVar[int]
    """Tokens of its script's batch."""
    own_micro_batch: ClassVar[int]
    """Sequences of a micro-batch, at most."""
    steps_between_waits: ClassVar[int] = 1
    """Its loop waits for the device once in so many steps."""
    recipe: str
    tokens_per_step: int
    sequences: int
    """Of a batch."""
    micro_batch: int
    """Sequences of a micro-batch."""
    model: nn.Module

    @abstractmethod
    def __init__(
        self, peer_dir: Path, shape: Shape, device: torch.device, recipe: Recipe
    ) -> None: ...

    @classmethod
    def batch(cls, shape: Shape, recipe: Recipe) -> tuple[int, int, float]:
        """Sequences of a batch and of a micro-batch, and the batch over the script's.

        Raises `ValueError` where the recipe's tokens do not divide into micro-batches.
        """
        own = 4 if shape.quick else cls.own_batch // shape.seq_len
        tokens = recipe.tokens_per_step or own * shape.seq_len
        sequences, rest = divmod(tokens, shape.seq_len)
        micro_batch = max(1, min(4 if shape.quick else cls.own_micro_batch, sequences))
        if rest or not sequences or sequences % micro_batch:
            raise ValueError(
                f"A batch of {tokens:,} tokens does not divide into micro-batches of {micro_batch} "
                f"sequences of {shape.seq_len}; give a multiple after the `@`."
            )
        return sequences, micro_batch, sequences / own

    @abstractmethod
    def start(self, steps: int) -> None:
        """A new optimizer and the schedules of a run of that many steps."""

    @abstractmethod
    def step(self, number: int, micro_batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step on all of the micro-batches."""

    @abstractmethod
    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each target in nats, float32 and of the shape of `targets`."""

    def evaluated(self) -> nn.Module:
        """The model as `matilda_train.evaluate` calls it."""
        return _Evaluated(self)


class _Evaluated(nn.Module):
    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self._peer = [peer]
        self.model = peer.model

    def forward(self, ids: Tensor, targets: Tensor, *, per_token: bool) -> Tensor:
        assert per_token
        return self._peer[0].losses(ids.contiguous(), targets.contiguous())


class NanoGPT(Peer):
    """karpathy/nanoGPT: `config/train_gpt2.py`, GPT-2 124M, with the sequences of the others."""

    own_batch = 491_520  # 12 × 40 sequences of 1024
    own_micro_batch = 16
    steps_between_waits = 10  # its `log_interval`

    def __init__(self, peer_dir: Path, shape: Shape, device: torch.device, recipe: Recipe) -> None:
        folder = peer_dir / "nanoGPT"
        with _import_path(folder):
            import model as nanogpt  # type: ignore[import-not-found]
        size = {"n_layer": 12, "n_head": 12, "n_embd": 768}
        if shape.quick:
            size = {"n_layer": 2, "n_head": 2, "n_embd": 32}
        gpt_config = nanogpt.GPTConfig(
            block_size=shape.seq_len, vocab_size=shape.vocab_size, dropout=0.0, bias=False, **size
        )
        self.model = nanogpt.GPT(gpt_config).to(device)
        self._device = device
        self._compiled = torch.compile(self.model) if device.type == "cuda" else self.model
        self._functions = (folder / "train.py", ("get_lr",))
        self.sequences, self.micro_batch, _ = self.batch(shape, recipe)
        self.tokens_per_step = self.sequences * shape.seq_len
        self._rate = 6e-4 * recipe.rate
        self.recipe = (
            "config/train_gpt2.py: 12 layers × 768, GPT-2's learned positions, GELU, AdamW "
            f"{self._rate:g}, decay 0.1, clip 1.0, cosine to a tenth over the run, warm-up 5 % of "
            f"it; compiled, bfloat16 by autocast, torch's attention; T={shape.seq_len} (1024 there)"
        )

    def start(self, steps: int) -> None:
        self._optimizer = self.model.configure_optimizers(  # type: ignore[operator]
            1e-1, self._rate, (0.9, 0.95), self._device.type
        )
        constants = {
            "learning_rate": self._rate,
            "min_lr": self._rate / 10,
            "warmup_iters": min(2000, steps // 20),
            "lr_decay_iters": steps,
        }
        self._get_lr = functions_of(*self._functions, constants)["get_lr"]

    def step(self, number: int, micro_batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._get_lr(number)
        accumulation = self.tokens_per_step // (self.micro_batch * self._seq_len())
        for ids, targets in micro_batches:
            with self._autocast():
                _, loss = self._compiled(ids.contiguous(), targets.contiguous())
                loss = loss / accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        with self._autocast():
            logits_BTV: Tensor = self._compiled(ids, targets)[0]
        # A sequence at a time: all logits in float32 would be twice those that training needs.
        return torch.stack(
            [
                nn.functional.cross_entropy(logits.float(), row, reduction="none")
                for logits, row in zip(logits_BTV, targets, strict=True)
            ]
        )

    def _seq_len(self) -> int:
        return int(self.model.config.block_size)  # type: ignore[union-attr, arg-type]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", torch.bfloat16)


class NanoChat(Peer):
    """karpathy/nanochat: `scripts/base_train.py --depth=12 --window-pattern=L`."""

    own_batch = 524_288
    own_micro_batch = 32

    def __init__(self, peer_dir: Path, shape: Shape, device: torch.device, recipe: Recipe) -> None:
        folder = peer_dir / "nanochat"
        with _import_path(folder):
            from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]
        size = {"n_layer": 12, "n_head": 6, "n_kv_head": 6, "n_embd": 768}
        if shape.quick:
            size = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 64}
        with torch.device("meta"):
            self.model = GPT(
                GPTConfig(
                    sequence_len=shape.seq_len,
                    vocab_size=shape.vocab_size,
                    window_pattern="L",
                    **size,
                )
            )
        self.model.to_empty(device=device)
        self.model.init_weights()  # type: ignore[operator]
        on_gpu = device.type == "cuda"
        self._compiled = torch.compile(self.model, dynamic=False) if on_gpu else self.model
        self._script = folder / "scripts" / "base_train.py"
        self.sequences, self.micro_batch, ratio = self.batch(shape, recipe)
        self.tokens_per_step = self.sequences * shape.seq_len
        # Its batch and depth 12 are the reference of its scaling laws, which say this of others.
        self._rate = recipe.rate * math.sqrt(ratio)
        self._weight_decay = 0.28 * math.sqrt(ratio)
        factor = "" if self._rate == 1 else f" times {self._rate:g}"
        self.recipe = (
            "scripts/base_train.py --depth=12 --window-pattern=L (as it advises without "
            f"FlashAttention 3): its Muon and AdamW rates{factor}, decay {self._weight_decay:g}, "
            "40 steps of warm-up, the last 65 % falling to 5 %, momentum and decay scheduled"
        )

    def start(self, steps: int) -> None:
        rates = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02}
        self._optimizer = self.model.setup_optimizer(  # type: ignore[operator]
            **{name: rate * self._rate for name, rate in rates.items()},
            weight_decay=self._weight_decay,
        )
        constants = {
            "args": Namespace(warmup_steps=40, warmdown_ratio=0.65, final_lr_frac=0.05),
            "num_iterations": steps,
            "weight_decay_scaled": self._weight_decay,
        }
        names = ("get_lr_multiplier", "get_muon_momentum", "get_weight_decay")
        self._schedule = functions_of(self._script, names, constants)
        gc.collect()
        gc.freeze()
        gc.disable()  # as its loop does, for half a second now and then

    def step(self, number: int, micro_batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        accumulation = self.tokens_per_step // (self.micro_batch * self._seq_len())
        for ids, targets in micro_batches:
            loss = self._compiled(ids.contiguous(), targets.contiguous()) / accumulation
            loss.backward()
        multiplier = self._schedule["get_lr_multiplier"](number)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"] = self._schedule["get_muon_momentum"](number)
                group["weight_decay"] = self._schedule["get_weight_decay"](number)
        self._optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        flat: Tensor = self._compiled(ids, targets, loss_reduction="none")
        return flat.view(targets.shape)

    def _seq_len(self) -> int:
        return int(self.model.config.sequence_len)  # type: ignore[union-attr, arg-type]


PEERS: dict[str, type[Peer]] = {
    "nanogpt": NanoGPT,
    "nanochat": NanoChat,
}
FOLDERS = {"nanogpt": "nanoGPT", "nanochat": "nanochat"}


def functions_of(
    script: Path, names: tuple[str, ...], constants: Mapping[str, Any]
) -> dict[str, Callable[..., float]]:
    """Functions of a training script as they stand there, without running the script.

    `constants` are the script's globals that they read. Raises `ValueError` naming what is missing.
    """
    tree = ast.parse(script.read_text(encoding="utf-8"))
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    missing = set(names) - {node.name for node in found}
    if missing:
        raise ValueError(f"{script} has no function {', '.join(sorted(missing))}; use its release.")
    namespace: dict[str, Any] = {"math": math, **constants}
    exec(compile(ast.Module(found, type_ignores=[]), str(script), "exec"), namespace)
    return {name: namespace[name] for name in names}


@contextlib.contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
