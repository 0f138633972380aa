"""Which back end updates which parameter."""

from __future__ import annotations

import importlib.util
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from matilda_optim.blocks import block_regions, block_spec
from matilda_optim.coefficients import resolve_coefficients
from matilda_optim.learning_rate import lr_ratio
from matilda_optim.newton_schulz import NS_DTYPES
from matilda_optim.reference import Work, reference_step
from matilda_optim.sharing import Sharing

if TYPE_CHECKING:
    from matilda_optim.triton_backend import KernelPlan
    from matilda_optim.triton_shards import WholeMatrices

BACKENDS = ("auto", "reference", "triton")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_available(device: torch.device) -> bool:
    """Whether the Triton kernels run on `device`: NVIDIA, compute capability 9.0 or newer."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def is_sharded(param: Tensor) -> bool:
    """Whether `param` is a DTensor, without importing torch.distributed.tensor for it."""
    return hasattr(param, "placements")


class MuonStep:
    """One Muon step over groups; keeps the kernels' tables between steps, which hold no state."""

    def __init__(self, backend: str, sharing: Sharing | None = None, graph: bool = False) -> None:
        if backend not in BACKENDS:
            raise ValueError(
                f"`backend` must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
            )
        self.backend = backend
        self.sharing = sharing or Sharing("none")
        self.graph = graph
        self._key: Hashable = None
        self._split: tuple[KernelPlan | None, Work, Work, Work] = (None, [], [], [])
        self._wholes: WholeMatrices | None = None
        self._devices: dict[torch.device, bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"backend": self.backend, "sharing": self.sharing, "graph": self.graph}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def forget(self) -> None:
        """Drops what was built for tensors and groups that may be replaced now."""
        self._key, self._split = None, (None, [], [], [])

    def __call__(self, groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]]) -> None:
        key = _structure(groups, states)
        if key != self._key:
            self._split = self._divide(groups, states)
            self._key = key
        plan, plain, sharded, sharded_plain = self._split
        if plan is not None:
            plan.step(self.sharing, self.sharing.mode != "none")
        if plain:
            reference_step(plain, states, self.sharing)
        if sharded:
            from matilda_optim.sharded import sharded_step
            from matilda_optim.triton_shards import WholeMatrices

            self._wholes = self._wholes or WholeMatrices()
            sharded_step(sharded, states, self._wholes)
        if sharded_plain:
            from matilda_optim.sharded import sharded_step

            sharded_step(sharded_plain, states, None)

    def _divide(
        self, groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]]
    ) -> tuple[KernelPlan | None, Work, Work, Work]:
        """The kernels' plan, the pure-torch work, and the DTensor work of either kind."""
        plain: Work = []
        kernel: Work = []
        sharded: Work = []
        sharded_plain: Work = []
        for group in groups:
            params = [p for p in group["params"] if p.grad is not None]
            spread = [p for p in params if is_sharded(p) and self._shards_fit(group, p)]
            others = [p for p in params if is_sharded(p) and not self._shards_fit(group, p)]
            whole = [p for p in params if not is_sharded(p)]
            fit = [p for p in whole if self._fits(group, p)]
            chosen = set(fit)
            rest = [p for p in whole if p not in chosen]
            for work, members in (
                (sharded, spread),
                (sharded_plain, others),
                (kernel, fit),
                (plain, rest),
            ):
                if members:
                    work.append((group, members))
        plan = _build_plan(kernel, states, self.graph) if kernel else None
        return plan, plain, sharded, sharded_plain

    def _shards_fit(self, group: dict[str, Any], param: Any) -> bool:
        """Whether the kernels can work on the local parts of a DTensor."""
        local = param.to_local()
        if not self._able(group, local) or isinstance(group["lr"], Tensor):
            return False
        from matilda_optim.triton_shards import one_ratio

        return one_ratio(group, param) is not None

    def _able(self, group: dict[str, Any], param: Tensor) -> bool:
        device = param.device
        if device not in self._devices:
            self._devices[device] = kernels_available(device)
        return (
            self.backend != "reference"
            and self._devices[device]
            and param.is_contiguous()
            and param.dtype in _KERNEL_DTYPES
            and group["ns_dtype"] != "float32"
            and group["normuon_beta2"] is None
        )

    def _fits(self, group: dict[str, Any], param: Tensor) -> bool:
        fits = (
            self._able(group, param)
            and param.numel() > 0
            and type(param) in (torch.nn.Parameter, Tensor)
        )
        if self.backend == "triton" and not fits:
            raise ValueError(
                f"the Triton back end cannot update a parameter of shape {tuple(param.shape)!r}, "
                f'{param.dtype} on {param.device}; use `backend="auto"`'
            )
        return fits


def _structure(groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]]) -> Hashable:
    """What a plan was built for; addresses and hyper-parameters may change under it."""
    params = [p for group in groups for p in group["params"]]
    options = [
        (
            id(group),
            len(group["params"]),
            group["nesterov"],
            str(group["ns_coefficients"]),
            group["ns_steps"],
            group["ns_dtype"],
            group["adjust_lr_fn"],
            group["cautious"],
            group["normuon_beta2"] is None,
            group["nonfinite"],
            block_spec(group),
        )
        for group in groups
    ]
    grads = [p.grad for p in params]
    return (
        id(states),
        options,
        list(map(id, params)),
        [p.dtype for p in params],
        [p.is_contiguous() for p in params],
        [None if g is None else g.dtype for g in grads],
    )


def _build_plan(work: Work, states: dict[Tensor, dict[str, Any]], graph: bool) -> KernelPlan:
    from matilda_optim.triton_backend import KernelClass, KernelKey, KernelPlan, Matrix

    members: dict[KernelKey, list[Matrix]] = {}
    for group, params in work:
        spec = block_spec(group)
        quintics = resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
        for p in params:
            assert p.grad is not None
            for offset, rows, cols in block_regions(p.shape, spec):
                key = KernelKey(
                    min(rows, cols),
                    max(rows, cols),
                    p.device,
                    p.dtype,
                    p.grad.dtype,
                    NS_DTYPES[group["ns_dtype"] or "float16"],
                    quintics,
                    group["nesterov"],
                    group["cautious"],
                    group["nonfinite"] == "skip",
                )
                ratio = lr_ratio(group["adjust_lr_fn"], rows, cols)
                matrix = Matrix(p, states[p], offset, rows, cols, ratio, group)
                members.setdefault(key, []).append(matrix)
    return KernelPlan([KernelClass(key, group) for key, group in members.items()], graph)
