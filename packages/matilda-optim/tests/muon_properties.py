"""The properties that `Muon` promises, each measured as one figure, on the CPU or on a GPU.

python tests/muon_properties.py [cpu|cuda …]      # a Markdown table, a column a device

Each function of PROPERTIES takes a device and returns a `Figure` that holds or does not. A figure
of bits counts the elements that differ.
"""

from __future__ import annotations

import copy
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matilda_optim import Muon, lr_ratio, orthogonalize, resolve_coefficients


@dataclass(frozen=True)
class Figure:
    """What was measured and the most that it may be."""

    value: float
    limit: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        number = f"{self.value:.0f}" if self.value == int(self.value) else f"{self.value:.2g}"
        return number + (f" {self.unit}" if self.unit else "")


def bits(pairs: Sequence[tuple[Tensor, Tensor]]) -> Figure:
    """Elements that differ in any bit but the sign of zero."""
    return Figure(sum(int((a != b).sum()) for a, b in pairs), 0, "differ")


def randn(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def update(grad: Tensor, **options: Any) -> Tensor:
    """orthogonalize(grad) as one step from zero makes it, through the default back end."""
    p = nn.Parameter(torch.zeros_like(grad))
    p.grad = grad.clone()
    settings = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "ns_coefficients": "polar_express"}
    Muon([p], **{**settings, **options}).step()
    return -p.detach() / lr_ratio(options.get("adjust_lr_fn"), *grad.shape)


def exact(grad: Tensor) -> Tensor:
    """The same polynomial in float64, on the singular values."""
    u, s, vt = torch.linalg.svd(grad.double().cpu(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s)
    for a, b, c in resolve_coefficients("polar_express", 5):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want.cpu()).norm() / want.norm())


def tolerance(device: str) -> float:
    """fp32 iterations on the CPU; fp16 on a GPU, where `test_optim_gpu.py` sets the same limit."""
    return 2e-5 if device == "cpu" else 2e-2


SHAPES = [(48, 96), (64, 64), (96, 40), (17, 33), (128, 256)]


def steps(
    device: str, count: int = 3, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[nn.Parameter], Muon]:
    """Seeded steps with a moving learning rate."""
    params = [
        nn.Parameter(randn(*shape, seed=i, device=device, dtype=dtype))
        for i, shape in enumerate(SHAPES)
    ]
    optimizer = Muon(params, lr=0.02, **options)
    more_steps(params, optimizer, 0, count)
    return params, optimizer


def more_steps(params: Sequence[nn.Parameter], optimizer: Muon, first: int, last: int) -> None:
    for step in range(first, last):
        for i, p in enumerate(params):
            seed = 1000 * (step + 1) + i
            p.grad = randn(*p.shape, seed=seed, device=str(p.device), dtype=p.dtype)
        optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
        optimizer.step()


def digest(params: Sequence[nn.Parameter]) -> str:
    """SHA-256 of all elements as stored; without numpy, which this package does not need."""
    raw = [p.detach().cpu().contiguous().view(-1).view(torch.uint8).tolist() for p in params]
    return hashlib.sha256(b"".join(map(bytes, raw))).hexdigest()


def singular_values_lie_in_the_band(device: str) -> Figure:
    u, v = (torch.linalg.qr(randn(n, 64, seed=n, device="cpu").double()).Q for n in (64, 192))
    spectrum = torch.logspace(0, -2, 64, dtype=torch.float64)
    out = update(((u * spectrum) @ v.mT).float().to(device))
    values = torch.linalg.svdvals(out.double().cpu())
    return Figure(float((values - 1).abs().max()), 0.13, "from 1")


def iterations_follow_the_float64_polynomial(device: str) -> Figure:
    grads = [randn(*shape, seed=i, device=device) for i, shape in enumerate(SHAPES)]
    return Figure(max(error(update(g), exact(g)) for g in grads), tolerance(device), "relative")


def powers_of_two_change_no_bit(device: str) -> Figure:
    g = randn(48, 96, seed=0, device=device)
    return bits([(update(g * 2.0**k), update(g)) for k in (-60, -9, 17, 60)])


def transposing_the_input_transposes_the_output(device: str) -> Figure:
    def symmetric_ratio(g: Tensor) -> Tensor:
        return update(g, adjust_lr_fn="match_rms_adamw")

    grads = [randn(*shape, seed=0, device=device) for shape in ((48, 96), (17, 33), (128, 256))]
    return bits([(symmetric_ratio(g.mT.contiguous()).mT, symmetric_ratio(g)) for g in grads])


def rotating_both_sides_rotates_the_output(device: str) -> Figure:
    g = randn(64, 96, seed=0, device="cpu").double()
    u, v = (torch.linalg.qr(randn(n, n, seed=n, device="cpu").double()).Q for n in (64, 96))
    turned = update((u @ g @ v).float().to(device))
    plain = update(g.float().to(device)).double().cpu()
    return Figure(error(turned, u @ plain @ v), tolerance(device), "relative")


def zero_gradients_decay_and_missing_ones_change_nothing(device: str) -> Figure:
    params = [nn.Parameter(randn(48, 96, seed=i, device=device)) for i in range(2)]
    start = [p.detach().clone() for p in params]
    params[0].grad = torch.zeros_like(params[0])
    Muon(params, lr=0.5, weight_decay=0.5).step()
    return bits([(params[0].detach(), start[0] * 0.75), (params[1].detach(), start[1])])


def degenerate_matrices_are_right_where_they_have_rank(device: str) -> Figure:
    """The polynomial lifts σ near 0 a thousandfold, rounding too: there it is only bounded."""
    rank_one = randn(48, 1, seed=0, device="cpu") @ randn(1, 96, seed=1, device="cpu")
    rank_eight = randn(48, 8, seed=2, device="cpu") @ randn(8, 96, seed=3, device="cpu")
    hot_row = torch.zeros(48, 96)
    hot_row[7] = randn(96, seed=4, device="cpu")
    doubled = randn(24, 96, seed=5, device="cpu").repeat(2, 1)
    thin = [randn(1, 96, seed=6, device="cpu"), randn(96, 1, seed=7, device="cpu")]
    worst = 0.0
    for grad in (rank_one, rank_eight, hot_row, doubled, *thin):
        u, s, vt = torch.linalg.svd(grad.double(), full_matrices=False)
        rank = int((s > 1e-4 * s[0]).sum())
        out = update(grad.to(device)).double().cpu()
        if not float(torch.linalg.matrix_norm(out, 2)) < 1.2:
            return Figure(float("inf"), 0, "relative")
        u, vt = u[:, :rank], vt[:rank]
        worst = max(worst, error(u.mT @ out @ vt.mT, u.mT @ exact(grad) @ vt.mT))
    return Figure(worst, 2 * tolerance(device), "relative")


def a_nan_touches_only_its_matrix(device: str) -> Figure:
    def after(value: float) -> list[Tensor]:
        params = [nn.Parameter(randn(48, 96, seed=i, device=device)) for i in range(4)]
        for i, p in enumerate(params):
            p.grad = randn(48, 96, seed=10 + i, device=device)
        params[1].grad[2, 3] = value  # type: ignore[index]
        optimizer = Muon(params, nonfinite="skip")
        optimizer.step()
        momenta = [optimizer.state[p]["momentum_buffer"] for p in params]
        return [p.detach() for p in params] + momenta

    pairs = list(zip(after(float("nan")), after(0.5), strict=True))
    spared = [pair for i, pair in enumerate(pairs) if i not in (1, 5)]
    start = randn(48, 96, seed=1, device=device)
    return bits([*spared, (pairs[1][0], start), (pairs[5][0], torch.zeros_like(start))])


def a_matrix_alone_equals_itself_in_a_batch(device: str) -> Figure:
    def after(count: int) -> list[Tensor]:
        params = [nn.Parameter(randn(48, 96, seed=i, device=device)) for i in range(count)]
        for i, p in enumerate(params):
            p.grad = randn(48, 96, seed=100 + i, device=device)
        Muon(params, lr=0.02).step()
        return [p.detach() for p in params]

    return bits([(after(1)[0], after(36)[0]), (after(5)[4], after(36)[4])])


def gram_matrices_are_symmetric(device: str) -> Figure:
    if device == "cpu":
        x = randn(4, 128, 256, seed=0, device=device)
        gram = torch.bmm(x, x.mT)
        return Figure(float((gram - gram.mT).abs().max() / gram.abs().max()), 1e-6, "relative")
    from matilda_optim.triton_products import symmetric

    x = randn(4, 256, 768, seed=0, device=device, dtype=torch.float16)
    gram = symmetric(x, x)
    cubic = symmetric(gram, gram, alpha=0.5, addend=gram, beta=-0.3, gamma=0.1)
    return bits([(gram, gram.mT), (cubic, cubic.mT)])


def gradients_are_only_read(device: str) -> Figure:
    params, optimizer = steps(device, 1)
    before = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.step()
    return bits([(p.grad, g) for p, g in zip(params, before, strict=True) if p.grad is not None])


def runs_and_processes_agree(device: str) -> Figure:
    here = {digest(steps(device)[0]) for _ in range(3)}
    command = [sys.executable, "-W", "ignore", __file__, "--digest", device]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return Figure(len(here | {done.stdout.strip()}) - 1, 0, "differ")


def a_resumed_run_continues(device: str) -> Figure:
    pairs = []
    for dtype in (torch.float32, torch.bfloat16):
        whole, _ = steps(device, 4, dtype)
        params, optimizer = steps(device, 2, dtype)
        state = copy.deepcopy(optimizer.state_dict())
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = Muon(copies, lr=9.0)
        resumed.load_state_dict(state)
        more_steps(copies, resumed, 2, 4)
        pairs += [(a.detach(), b.detach()) for a, b in zip(copies, whole, strict=True)]
    return bits(pairs)


def offsets_beyond_two_to_the_31(device: str) -> Figure | None:
    """The last of 2^31 / (768 · 3072) + 1 matrices of a batch equals itself alone; 17 GB."""
    if device == "cpu":
        return None
    count = 2**31 // (768 * 3072) + 2
    grad = randn(768, 3072, seed=0, device=device, dtype=torch.bfloat16)
    params = [nn.Parameter(torch.zeros_like(grad)) for _ in range(count)]
    for p in params:
        p.grad = grad
    Muon(params, lr=0.02).step()
    alone = nn.Parameter(torch.zeros_like(grad))
    alone.grad = grad
    Muon([alone], lr=0.02).step()
    return bits([(params[i].detach(), alone.detach()) for i in (0, count // 2, count - 1)])


def update_rms_is_as_documented(device: str) -> Figure:
    worst = 0.0
    for rows, cols in ((128, 128), (64, 256), (256, 64)):
        p = nn.Parameter(torch.zeros(rows, cols, device=device))
        p.grad = randn(rows, cols, seed=rows, device=device)
        settings = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
        Muon([p], lr=1.0, ns_coefficients="polar_express_tight", **settings).step()  # type: ignore[arg-type]
        worst = max(worst, abs(float(p.detach().square().mean().sqrt()) / 0.2 - 1))
    return Figure(worst, 0.03, "relative")


def a_graph_replays_a_moving_learning_rate(device: str) -> Figure | None:
    if device == "cpu":
        return None
    eager, replayed = steps(device, 6)[0], steps(device, 6, graph=True)[0]
    return bits([(a.detach(), b.detach()) for a, b in zip(eager, replayed, strict=True)])


def the_pure_form_is_the_same_polynomial(device: str) -> Figure:
    g = randn(48, 96, seed=0, device=device)
    return Figure(error(orthogonalize(g), exact(g)), tolerance(device), "relative")


PROPERTIES: list[Callable[[str], Figure | None]] = [
    singular_values_lie_in_the_band,
    iterations_follow_the_float64_polynomial,
    the_pure_form_is_the_same_polynomial,
    powers_of_two_change_no_bit,
    transposing_the_input_transposes_the_output,
    rotating_both_sides_rotates_the_output,
    zero_gradients_decay_and_missing_ones_change_nothing,
    degenerate_matrices_are_right_where_they_have_rank,
    a_nan_touches_only_its_matrix,
    a_matrix_alone_equals_itself_in_a_batch,
    gram_matrices_are_symmetric,
    gradients_are_only_read,
    runs_and_processes_agree,
    a_resumed_run_continues,
    offsets_beyond_two_to_the_31,
    update_rms_is_as_documented,
    a_graph_replays_a_moving_learning_rate,
]


def main() -> int:
    if sys.argv[1:2] == ["--digest"]:
        print(digest(steps(sys.argv[2])[0]))
        return 0
    devices = sys.argv[1:] or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print("| property | " + " | ".join(devices) + " |")
    print("|---" * (len(devices) + 1) + "|")
    failed = False
    for measure in PROPERTIES:
        cells = []
        for device in devices:
            figure = measure(device)
            failed |= figure is not None and not figure.holds
            mark = "" if figure is None or figure.holds else f" (more than {figure.limit:g})"
            cells.append("–" if figure is None else f"{figure}{mark}")
        print(f"| {measure.__name__.replace('_', ' ')} | " + " | ".join(cells) + " |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
