"""`Muon`: orthogonalised momentum for hidden matrices and AdamW for the rest, in one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from matilda_optim.adamw import adamw_step, init_adamw_state, master_dtype
from matilda_optim.backends import MuonStep, is_sharded
from matilda_optim.blocks import block_spec, check_blocks
from matilda_optim.coefficients import KELLER, resolve_coefficients
from matilda_optim.learning_rate import check_adjust_lr_fn
from matilda_optim.metrics import matrix_metrics
from matilda_optim.newton_schulz import NS_DTYPES
from matilda_optim.normuon import init_normuon_state
from matilda_optim.sharing import Sharing
from matilda_optim.state import (
    align_state_dict,
    check_shapes,
    drop_strangers,
    follow_parameter,
    restore_in_place,
)


class Muon(Optimizer):
    """Muon for matrices, AdamW for everything else, behind one `state_dict`.

    A drop-in for `torch.optim.Muon`: the positional arguments, group keys and state key
    (`momentum_buffer`) are the same, and its checkpoints load. Groups with `algorithm="adamw"` are
    updated by AdamW. `param_groups(model, …)` builds both kinds from a model.

    One Muon step on a matrix W with gradient G (Jordan et al. 2024):
    `M ← β·M + (1-β)·G`, `U = β·M + (1-β)·G` (Nesterov) or `M`,
    `W ← (1 - lr·weight_decay)·W - lr·ratio(shape)·orthogonalize(U)`.

    State is created here (`momentum_buffer`; `exp_avg`, `exp_avg_sq` and `step` for AdamW): fp32
    also for 16-bit parameters, fp64 for fp64 ones. The next step or load makes again what was
    cleared, and lets it follow a model that was moved or cast before. `.grad` is only read. A
    parameter whose gradient is None is left alone. Equal inputs give equal bits, in any process and
    after any resume.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate; a float or a one-element tensor.
        weight_decay: decoupled; the decay of one step is `lr·weight_decay`.
        momentum: β above, in [0, 1).
        nesterov: look ahead as above.
        ns_coefficients: a preset's name (`"polar_express"`, `"keller"`, …), one (a, b, c) or one
            per step. The default is torch's; `param_groups` sets `"polar_express"`.
        eps: accepted for compatibility and not used: the normalisation is scale invariant and needs
            none. AdamW's is `adam_eps`.
        ns_steps: Newton–Schulz iterations.
        adjust_lr_fn: None or "original", "match_rms_adamw", "spectral_unclamped"; see `lr_ratio`.
        betas: of AdamW groups.
        adam_eps: of AdamW groups that do not set `eps`.
        ns_dtype: "float16", "bfloat16" or "float32" for the iterations; None is fp16 on CUDA and
            fp32 on CPU.
        maximize: ascend instead.
        cautious: of Muon groups: decay only what the update shrinks too (arXiv 2510.12402).
        normuon_beta2: of Muon groups: None, or NorMuon's β₂ (0.95 in arXiv 2510.05491), which adds
            the state `second_momentum`, one value a row, and runs in pure torch.
        nonfinite: "propagate" lets a NaN or Inf gradient through to its own matrix; "skip" leaves
            that matrix and its momentum as they were, and of an AdamW group all of it. Neither
            waits for a GPU.
        backend: "auto" takes Triton kernels on NVIDIA GPUs of compute capability 9.0 and newer for
            contiguous parameters and pure torch elsewhere; "reference" is pure torch everywhere;
            "triton" raises where the kernels cannot run.
        distribute: "none"; "ddp" shares the orthogonalisation out over the ranks of
            `process_group`, whose gradients must be equal (as after DDP's all-reduce); "auto" does
            so for the shapes where it is measured to be faster. The parameters are the same bits
            in all three. DTensor parameters (FSDP2) need no setting.
        graph: the Triton back end replays its launches as a CUDA graph of its own from the third
            step on, the shape classes side by side. It keeps the workspace allocated. Not needed
            where the whole step is captured anyway, and without effect then.

    Group keys beside these: `algorithm` ("muon" or "adamw"), `name`, `param_names`, and for fused
    weights `split` (rows of each block), `heads` (equal blocks of rows) or `stacked` (leading
    dimension is a batch of matrices).

    Raises:
        ValueError: an option or a parameter's shape that Muon cannot use, naming it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = KELLER,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        ns_dtype: str | None = None,
        maximize: bool = False,
        cautious: bool = False,
        normuon_beta2: float | None = None,
        nonfinite: str = "propagate",
        backend: str = "auto",
        distribute: str = "none",
        process_group: Any = None,
        graph: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "algorithm": "muon",
            "betas": tuple(betas),
            "ns_dtype": ns_dtype,
            "maximize": maximize,
            "cautious": cautious,
            "normuon_beta2": normuon_beta2,
            "nonfinite": nonfinite,
            # the base class adds it on load: a state must not grow by a round trip
            "differentiable": False,
        }
        self._adam_eps = adam_eps
        self._seen: tuple[int, int, int] | None = None
        self._params: list[Tensor] = []
        self._gradless: list[tuple[str, Tensor]] = []
        self._muon_step = MuonStep(backend, Sharing(distribute, process_group), graph)
        super().__init__(params, defaults)
        self._stay_out_of_graphs()

    def _stay_out_of_graphs(self) -> None:
        """A compiled train step calls the update as it is: one graph break, no tracing."""
        # a module's function: a bound method would keep parameters alive until the next collection
        self._update = torch.compiler.disable(_update_groups)  # type: ignore[no-untyped-call]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, checks it and creates its state."""
        if isinstance(param_group, dict) and param_group.get("algorithm") == "adamw":
            param_group.setdefault("eps", self._adam_eps)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        for param in group["params"]:
            self._init_state(group, param)

    def _init_state(self, group: dict[str, Any], param: Tensor) -> bool:
        """Makes what state `param` lacks; returns whether there was any to make."""
        state = self.state.setdefault(param, {})
        had = len(state)
        if group["algorithm"] == "adamw":
            if "exp_avg" not in state:
                init_adamw_state(state, param)
            return len(state) > had
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(
                param, dtype=master_dtype(param), memory_format=torch.preserve_format
            )
        if group["normuon_beta2"] is not None and "second_momentum" not in state:
            init_normuon_state(state, param, block_spec(group))
        return len(state) > had

    def _settle(self) -> None:
        """State for every parameter, where the parameter is: both may have been exchanged."""
        params = [p for group in self.param_groups for p in group["params"]]
        same = self._seen == (id(self.state), len(self.state), len(params))
        if same and all(map(is_, params, self._params)) and all(self.state.values()):
            return
        made = [self._init_state(g, p) for g in self.param_groups for p in g["params"]]
        moved = [follow_parameter(self.state[p], p) for p in params]
        drop_strangers(self.state, params, replaced=any(made))
        if any(made) or any(moved):
            self._muon_step.forget()  # a plan holds the states that it was built for
        self._gradless = _named(self.param_groups)
        self._seen, self._params = (id(self.state), len(self.state), len(params)), params

    def __getstate__(self) -> dict[str, Any]:
        extra = {"_adam_eps": self._adam_eps, "_muon_step": self._muon_step}
        return {**super().__getstate__(), **extra}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stay_out_of_graphs()
        self._muon_step.forget()
        self._seen = None
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizers give it; complete from the start."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of `torch.optim.Muon`, in place and bit for bit.

        When both sides have `param_names`, parameters are matched by name, in any order and
        grouping of names that forms the same groups, and whether the model was wrapped by
        `torch.compile`, DDP, FSDP1 or activation checkpointing or not. State tensors keep their
        addresses and fp32. Options that a saved group lacks stay as they are.

        Raises:
            ValueError: other parameters or groups than this optimizer's, naming the difference.
        """
        self._seen = None  # the model may have been moved since
        self._settle()
        before = dict(self.state)
        aligned: dict[str, Any] = {}

        def align(_: Optimizer, received: dict[str, Any]) -> dict[str, Any]:
            aligned.update(align_state_dict(self.param_groups, received))
            check_shapes(self, aligned)  # before anything is changed
            return aligned

        def restore(_: Optimizer) -> None:
            restore_in_place(self, before, aligned)

        # inside of the user's hooks: theirs may change what comes, and see what is there after it
        last = self.register_load_state_dict_pre_hook(align)
        first = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            first.remove()

    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """Figures of each Muon group from its momentum, as 0-d tensors on the device.

        Means over the group's matrices: `update_rms` (of the orthogonal update times its ratio),
        `update_to_param` (RMS of the step over RMS of the parameters), `sigma2_mean` and
        `sigma2_spread` (mean and standard deviation of the squared singular values of the update,
        1 and 0 when exact), `effective_rank` (of the momentum, (Σσ²)²/Σσ⁴); and the number of
        matrices that are zero or not finite. A call costs about as much as a step, other steps
        nothing. DTensor momenta are gathered: call it on every rank.
        """
        self._settle()
        return matrix_metrics(self.param_groups, self.state)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns the closure's loss.

        Raises:
            ValueError: a sparse gradient, naming its parameter, before anything is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(self)
        return loss


def _update_groups(optimizer: Muon) -> None:
    optimizer._settle()
    if optimizer._gradless:
        optimizer._gradless = _check_gradients(optimizer._gradless)
    muon_groups = [group for group in optimizer.param_groups if group["algorithm"] == "muon"]
    for group in optimizer.param_groups:
        if group["algorithm"] == "adamw":
            adamw_step(group, optimizer.state)
    if muon_groups:
        optimizer._muon_step(muon_groups, optimizer.state)


def _named(groups: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """Every parameter with what to call it in an error."""
    named = []
    for i, group in enumerate(groups):
        names = group.get("param_names", ())
        if len(names) != len(group["params"]):
            names = [f"{j} of group {group.get('name', i)}" for j in range(len(group["params"]))]
        named += list(zip(names, group["params"], strict=True))
    return named


def _check_gradients(named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Refuses sparse gradients; returns the parameters that have had none to look at yet.

    What makes a gradient sparse is the module, so one look at each is enough.
    """
    for name, param in named:
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise ValueError(
                f"the gradient of parameter {name!r} is sparse and Muon and its AdamW need dense "
                "ones; build its embedding with `sparse=False`"
            )
    return [(name, param) for name, param in named if param.grad is None]


def _check_group(group: dict[str, Any]) -> None:
    if "use_muon" in group:
        raise ValueError('`use_muon` is not a key here: say `algorithm="muon"` or "adamw"')
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"`lr` given as a tensor needs one element, got shape {tuple(lr.shape)!r}")
    if not isinstance(lr, Tensor) and not lr >= 0.0:
        raise ValueError(f"`lr` must be at least 0, got {lr!r}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"`weight_decay` must be at least 0, got {group['weight_decay']!r}")
    if group["algorithm"] not in ("muon", "adamw"):
        raise ValueError(f'`algorithm` must be "muon" or "adamw", got {group["algorithm"]!r}')
    names = group.get("param_names")
    if names is not None and len(names) != len(group["params"]):
        raise ValueError(
            f"`param_names` has {len(names)} names for {len(group['params'])} parameters"
        )
    for i, p in enumerate(group["params"]):
        if p.is_complex():
            raise ValueError(f"parameter {names[i] if names else i!r} is complex; Muon needs real")
    if group["nonfinite"] not in ("propagate", "skip"):
        raise ValueError(f'`nonfinite` must be "propagate" or "skip", got {group["nonfinite"]!r}')
    if group["algorithm"] == "adamw":
        beta1, beta2 = group["betas"]
        if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
            raise ValueError(f"`betas` must lie in [0, 1), got {group['betas']!r}")
        if not group["eps"] >= 0.0:
            raise ValueError(f"`eps` must be at least 0, got {group['eps']!r}")
        return
    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"`momentum` must lie in [0, 1), got {group['momentum']!r}")
    check_adjust_lr_fn(group["adjust_lr_fn"])
    if group["normuon_beta2"] is not None:
        if not 0.0 <= group["normuon_beta2"] < 1.0:
            raise ValueError(f"`normuon_beta2` must lie in [0, 1), got {group['normuon_beta2']!r}")
        if any(is_sharded(p) for p in group["params"]):
            raise ValueError("`normuon_beta2` does not support DTensor parameters; leave it None")
    resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
    if group["ns_dtype"] is not None and group["ns_dtype"] not in NS_DTYPES:
        raise ValueError(
            f"`ns_dtype` must be None or one of {', '.join(map(repr, NS_DTYPES))}, "
            f"got {group['ns_dtype']!r}"
        )
    for i, p in enumerate(group["params"]):
        check_blocks(p.shape, block_spec(group), names[i] if names else f"parameter {i}")
