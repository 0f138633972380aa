"""What stands between a bad batch and the weights, without the host waiting for the device.

A step's loss and gradient norm are judged on the device before the update. The verdict becomes a
factor of the gradients: the clipping coefficient, or NaN where the step must not happen. The
optimizer, built with `nonfinite="skip"`, leaves weights and state of a NaN gradient bitwise as
they were. The host learns of it later, from an asynchronous copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from matilda_ckpt import NotFiniteError
from matilda_train.errors import TrainingDivergedError

__all__ = ["StepGuard", "Verdict", "clip_gradients", "gradient_norms"]

DECAY = 0.99
"""Of the exponentially weighted mean and variance: they remember about a hundred steps."""

SMALLEST_STD = 1e-3
"""Of the mean: a run of nearly equal losses must not make a spike of the next digit."""

SMALLEST_SPIKE = (0.0, 2.0)
"""Times the mean, of loss and gradient norm: where a falling learning rate has calmed the norm, one
of half as much again is many standard deviations above it, and means nothing."""


@dataclass(frozen=True)
class Verdict:
    """What the guard found in a step."""

    loss: float
    grad_norm: float
    """Before clipping."""
    loss_z: float
    """Standard deviations above the running mean; nan before the warm-up is over."""
    grad_norm_z: float
    finite: bool
    spike: bool
    """Finite, and loss or gradient norm far enough above their means."""
    skipped: bool
    """The update did not happen."""
    consecutive: int
    """Steps in a row, up to this one, that were not finite."""

    @property
    def objection(self) -> Literal["nonfinite", "spike"] | None:
        """Why somebody should hear of this step, or None."""
        if not self.finite:
            return "nonfinite"
        return "spike" if self.spike else None

    def figures(self) -> dict[str, float | bool]:
        """As metrics rows and events carry them."""
        return {
            "loss_nats": self.loss,
            "loss_z": self.loss_z,
            "grad_norm": self.grad_norm,
            "grad_norm_z": self.grad_norm_z,
            "skipped": self.skipped,
        }

    def __str__(self) -> str:
        figures = f"loss {self.loss:.4f}, gradient norm {self.grad_norm:.4f}"
        if self.spike:
            figures += f" (z {self.loss_z:.1f} and {self.grad_norm_z:.1f})"
        return f"{figures}: {'skipped' if self.skipped else 'trained on'}"


class StepGuard:
    """Judges each step on the device; keeps the statistics that spikes are measured against.

    A spike is a loss or gradient norm more than `threshold` standard deviations above its
    exponentially weighted mean, and for a gradient norm more than twice that mean, after
    `warmup_steps` finite steps. An outlier moves mean and
    variance only as far as the threshold, so one bad batch does not hide the next and a lasting
    change is soon normal. `policy` "off" finds no spikes, "warn" lets their updates happen, any
    other vetoes them.

    On a CPU a verdict is known at once; on a GPU by the time the next step has been queued. All
    ranks must be given the same numbers, so that they come to the same verdicts.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        policy: str = "off",
        threshold: float = 6.0,
        warmup_steps: int = 100,
    ) -> None:
        self._policy = policy
        self._threshold = threshold
        self._warmup_steps = warmup_steps
        # float64: the square of any finite float32 is finite
        self._smallest_spike = torch.tensor(SMALLEST_SPIKE, dtype=torch.float64, device=device)
        self._mean = torch.zeros(2, dtype=torch.float64, device=device)
        self._var = torch.zeros(2, dtype=torch.float64, device=device)
        self._seen = torch.zeros((), dtype=torch.float64, device=device)
        self._consecutive = torch.zeros((), dtype=torch.float64, device=device)
        on_gpu = device.type == "cuda"
        self._report = torch.zeros(8, dtype=torch.float64, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._known = False
        self.pending = False
        """Whether a step has been judged and its verdict not been read."""
        self.grad_norms = torch.zeros(0, device=device)
        """Norm of each gradient in the step judged last, [parameters], on the device."""

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norms: Tensor) -> tuple[Tensor, Tensor]:
        """(whether the update may happen, global gradient norm): scalars on the device.

        `loss` is a scalar, `grad_norms` the norm of each gradient, [parameters].
        """
        grad_norm = torch.linalg.vector_norm(grad_norms)
        values = torch.stack((loss, grad_norm)).double()
        finite = torch.isfinite(values).all()
        warm = self._seen >= self._warmup_steps
        distance = values - self._mean
        std = torch.maximum(self._var.sqrt(), SMALLEST_STD * self._mean.abs())
        z = torch.where(warm, distance / std, torch.nan)
        far = (z > self._threshold) & (values > self._smallest_spike * self._mean)
        spike = finite & far.any() & (self._policy != "off")
        allowed = finite if self._policy == "warn" else finite & ~spike

        limit = torch.where(warm, self._threshold * std, torch.inf)
        absorbed = torch.minimum(torch.maximum(distance, -limit), limit)
        rate = torch.clamp(1 / (self._seen + 1), min=1 - DECAY)
        self._mean.copy_(torch.where(finite, self._mean + rate * absorbed, self._mean))
        var = (1 - rate) * (self._var + rate * absorbed**2)
        self._var.copy_(torch.where(finite, var, self._var))
        self._seen += finite
        self._consecutive.copy_(torch.where(finite, 0.0, self._consecutive + 1))

        flags = torch.stack((finite, spike, ~allowed)).double()
        report = torch.cat((values, z, flags, self._consecutive[None]))
        self._report.copy_(report, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        self.grad_norms = grad_norms
        self.pending, self._known = True, self._arrived is None
        return allowed, grad_norm

    @property
    def known(self) -> bool:
        """Whether there is a verdict to read without waiting, on every rank alike."""
        return self.pending and self._known

    def objects(self) -> bool:
        """Whether the unread verdict has an objection; without one it counts as read.

        Meant to be asked when the next step has been queued up to its update: the device, busy
        with that, has judged the step before and nothing waits.
        """
        if not self.pending:
            return False
        verdict = self.read()
        self.pending = self._known = verdict.objection is not None
        return self.pending

    def read(self) -> Verdict:
        """The verdict of the step judged last, once the device has come to it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        self.pending = False
        loss, grad_norm, loss_z, grad_norm_z, finite, spike, skipped, run = self._report.tolist()
        return Verdict(
            loss=loss,
            grad_norm=grad_norm,
            loss_z=loss_z,
            grad_norm_z=grad_norm_z,
            finite=bool(finite),
            spike=bool(spike),
            skipped=bool(skipped),
            consecutive=int(run),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The running statistics, tensors on the device."""
        return {
            "mean": self._mean,
            "var": self._var,
            "seen": self._seen,
            "consecutive": self._consecutive,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved statistics; an unread verdict is forgotten."""
        self.pending = False
        for name, value in self.state_dict().items():
            value.copy_(state[name])


@contextmanager
def diverged_if_not_finite(note: Callable[[], None]) -> Iterator[None]:
    """Ends the run as diverged, after `note()`, when its state was too broken to be saved."""
    try:
        yield
    except NotFiniteError as error:
        note()
        sentence = str(error)
        raise TrainingDivergedError(
            f"{sentence[0].upper()}{sentence[1:]}; the same command goes on from the newest"
        ) from error


def gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm of each parameter's gradient, [parameters], on the device; 0 where it has none.

    Gradients sharded over a mesh count whole; all of them cost one exchange.
    """
    none = torch.zeros((), device=parameters[0].device)
    gradients = [none if p.grad is None else p.grad for p in parameters]
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norms = torch.stack(torch._foreach_norm(parts))
    meshes = {g.device_mesh for g in gradients if isinstance(g, DTensor)}
    if not meshes:
        return norms
    (mesh,) = meshes
    # float64: the square of any finite float32 is finite
    squares = norms.double().square()
    torch.distributed.all_reduce(squares, group=mesh.get_group())
    return squares.sqrt().float()


def clip_gradients(
    parameters: Sequence[nn.Parameter], max_norm: float, loss: Tensor, guard: StepGuard
) -> None:
    """Have the step judged, and scale its gradients by one factor on the device.

    The factor takes their global L2 norm to at most `max_norm` (0 leaves it alone), or is NaN
    where `guard` vetoes the step.
    """
    allowed, norm = guard.judge(loss, gradient_norms(parameters))
    factor = torch.ones_like(norm)
    if max_norm > 0:
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils clips
    factor = torch.where(allowed, factor, torch.nan)
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
