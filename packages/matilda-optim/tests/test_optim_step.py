"""What one step does: learning, parity with torch's optimizers, and what it must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from matilda_optim import Muon, lr_ratio, orthogonalize, param_groups


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(64, 16, generator=g), torch.randint(0, 10, (64,), generator=g)


def losses(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> list[float]:
    x, y = batch()
    out = []
    for _ in range(steps):
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        out.append(loss.item())
    return out


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_one_batch_is_overfitted(algorithm: str) -> None:
    model = mlp()
    groups = param_groups(model, algorithm=algorithm, lr=1e-2, weight_decay=0.0, min_dim=10)
    curve = losses(model, [Muon(groups)], 150)
    assert curve[0] > 2.0
    assert curve[-1] < 0.02


def test_a_user_of_torch_muon_changes_one_import_and_keeps_the_loss() -> None:
    def run(muon: type[torch.optim.Optimizer]) -> list[float]:
        model = mlp()
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim != 2]
        return losses(
            model, [muon(matrices, 0.02, 0.1, 0.95), torch.optim.AdamW(vectors, lr=1e-2)], 60
        )

    theirs, ours = run(torch.optim.Muon), run(Muon)
    assert theirs[-1] < 0.1
    assert ours[-1] == pytest.approx(theirs[-1], abs=0.02)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.1


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_updates_equal_torch_muon_within_bf16_noise(
    shape: tuple[int, int], adjust: str | None, nesterov: bool
) -> None:
    if adjust == "spectral_unclamped" and torch.__version__ < "2.12":
        pytest.skip("this torch.optim.Muon has no spectral_unclamped")
    g = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=g)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.05, "weight_decay": 0.3, "nesterov": nesterov, "adjust_lr_fn": adjust}
    a = Muon([ours], **options, ns_dtype="bfloat16")
    b = torch.optim.Muon([theirs], **options)
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=g)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() / moved < 0.02
    torch.testing.assert_close(
        a.state[ours]["momentum_buffer"], b.state[theirs]["momentum_buffer"], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_groups_equal_torch_adamw_bitwise(weight_decay: float) -> None:
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=g) for s in [(33, 7), (5,), (), (64, 64)]]
    ours = [nn.Parameter(t.clone()) for t in start]
    theirs = [nn.Parameter(t.clone()) for t in start]
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    a = Muon([{"params": ours, "algorithm": "adamw", **options}])
    b = torch.optim.AdamW(theirs, **options)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(a.state[p][key], b.state[q][key])


@pytest.mark.parametrize(
    ("adjust", "want"),
    [
        (None, lambda m, n: math.sqrt(max(1, m / n)) / math.sqrt(max(m, n))),
        ("match_rms_adamw", lambda m, n: 0.2),
        ("spectral_unclamped", lambda m, n: math.sqrt(m / n) / math.sqrt(max(m, n))),
    ],
)
@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256)])
def test_update_rms_is_the_documented_value(
    adjust: str | None, want: object, shape: tuple[int, int]
) -> None:
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([p], lr=1.0, adjust_lr_fn=adjust, ns_coefficients="polar_express_tight").step()
    rms = p.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(want(*shape), rel=0.03)  # type: ignore[operator]


def test_gradients_are_only_read() -> None:
    model = mlp()
    optimizer = Muon(param_groups(model, lr=1e-2, weight_decay=0.1, min_dim=10), maximize=True)
    x, y = batch()
    functional.cross_entropy(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    optimizer.step()
    for p, g in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, g)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_parameter_without_a_gradient_is_left_alone(algorithm: str) -> None:
    p, q = nn.Parameter(torch.ones(16, 16)), nn.Parameter(torch.ones(16, 16))
    optimizer = Muon([{"params": [p, q], "algorithm": algorithm}], weight_decay=0.5)
    q.grad = torch.randn(16, 16)
    optimizer.step()
    assert torch.equal(p, torch.ones(16, 16))
    assert p.grad is None
    assert all(not value.any() for value in optimizer.state[p].values())
    assert not torch.equal(q, torch.ones(16, 16))


def test_a_zero_gradient_decays_and_nothing_else() -> None:
    p = nn.Parameter(torch.ones(16, 16))
    p.grad = torch.zeros(16, 16)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(p, torch.full((16, 16), 1 - 0.1 * 0.5))


def test_maximize_ascends_along_the_same_direction() -> None:
    p, q = nn.Parameter(torch.zeros(16, 32)), nn.Parameter(torch.zeros(16, 32))
    p.grad = torch.randn(16, 32)
    q.grad = p.grad.clone()
    Muon([p]).step()
    Muon([q], maximize=True).step()
    assert torch.equal(p, -q)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"cautious": True}, {"nonfinite": "skip"}])
def test_a_tensor_learning_rate_equals_a_float(
    shape: tuple[int, ...], options: dict[str, object]
) -> None:
    def run(lr: float | Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        g = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.ones(s, dtype=torch.float64)) for s in ((16, 32), (5,), ())]
        rest = {"params": params[1:], "algorithm": "adamw"}
        optimizer = Muon([{"params": params[:1]}, rest], lr=lr, **options)  # type: ignore[arg-type]
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
            optimizer.step()
        return params, optimizer.metrics()["group 0"]

    params, figures = run(0.125)
    others, their_figures = run(torch.full(shape, 0.125))
    torch.testing.assert_close(others, params, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(their_figures, figures)


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_sparse_gradient_is_refused_by_name_and_changes_nothing(algorithm: str) -> None:
    model = nn.ModuleDict({"up": nn.Linear(32, 32), "rows": nn.Embedding(50, 32, sparse=True)})
    vectors = [(n, p) for n, p in model.named_parameters() if p.ndim < 2]
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    groups = [
        {"params": vectors, "algorithm": "adamw"},
        {"params": matrices, "algorithm": algorithm},
    ]
    optimizer = Muon(groups)
    rows = model["rows"].weight

    def train(ids: Tensor | None) -> None:
        x = torch.ones(1, 32) if ids is None else model["rows"](ids)
        optimizer.zero_grad()
        model["up"](x).square().sum().backward()
        optimizer.step()

    train(None)
    tensors = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
    before = [t.detach().clone() for t in tensors]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'rows\.weight' is sparse.*`sparse=False`"):
            train(torch.arange(4))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    unnamed = Muon([{"params": [rows], "algorithm": "adamw"}])
    with pytest.raises(ValueError, match="parameter '0 of group 0' is sparse"):
        unnamed.step()


def test_a_bf16_parameter_is_updated_in_fp32_and_rounded_once() -> None:
    start = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    grad = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for algorithm in ("muon", "adamw"):
        p, q = nn.Parameter(start.clone()), nn.Parameter(start.float())
        p.grad, q.grad = grad.clone(), grad.float()
        optimizer = Muon([{"params": [p], "algorithm": algorithm}], lr=0.01)
        optimizer.step()
        Muon([{"params": [q], "algorithm": algorithm}], lr=0.01).step()
        assert torch.equal(p, q.bfloat16())
        assert all(v.dtype == torch.float32 for v in optimizer.state[p].values())


def test_float64_parameters_keep_their_digits() -> None:
    still = nn.Parameter(torch.full((16, 16), 0.1, dtype=torch.float64))
    still.grad = torch.zeros_like(still)
    Muon([still], weight_decay=0.0, normuon_beta2=0.9).step()
    assert (still == 0.1).all()
    g = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=g, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([{"params": [ours], "algorithm": "adamw"}], lr=1e-3, weight_decay=0.1)
    b = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        ours.grad = torch.randn(5, 7, generator=g, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert torch.equal(ours, theirs)


def test_fused_blocks_and_stacks_are_orthogonalised_one_by_one() -> None:
    grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(torch.zeros(64, 32))
    p.grad = grad.clone()
    Muon([{"params": [p], "split": (32, 16, 16)}], lr=1.0, momentum=0.0).step()
    parts = [
        orthogonalize(b, coefficients="keller") * lr_ratio(None, *b.shape)
        for b in grad.split([32, 16, 16])
    ]
    assert torch.equal(p, -torch.cat(parts))
    stack = nn.Parameter(torch.zeros(4, 16, 32))
    stack.grad = grad.view(4, 16, 32).clone()
    Muon([{"params": [stack], "stacked": True}], lr=1.0, momentum=0.0).step()
    assert torch.equal(stack, -orthogonalize(grad.view(4, 16, 32), coefficients="keller"))


def test_a_convolution_is_flattened_and_keeps_its_memory_format() -> None:
    grad = torch.randn(16, 8, 3, 3)
    p = nn.Parameter(torch.zeros(16, 8, 3, 3).to(memory_format=torch.channels_last))
    p.grad = grad.to(memory_format=torch.channels_last)
    q = nn.Parameter(torch.zeros(16, 72))
    q.grad = grad.reshape(16, 72)
    Muon([p]).step()
    Muon([q]).step()
    assert torch.equal(p.reshape(16, 72), q)
    assert p.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr`"),
        ({"weight_decay": -0.1}, "`weight_decay`"),
        ({"momentum": 1.0}, "`momentum`"),
        ({"adjust_lr_fn": "moon"}, "`adjust_lr_fn`"),
        ({"ns_steps": 0}, "`ns_steps`"),
        ({"ns_coefficients": "moon"}, "`ns_coefficients`"),
        ({"ns_dtype": "float8"}, "`ns_dtype`"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.zeros(4, 4))], **options)  # type: ignore[arg-type]


def test_a_vector_in_a_muon_group_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"`bias` has shape \(4,\).*adamw"):
        Muon([("bias", nn.Parameter(torch.zeros(4)))])
    matrix = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="`algorithm`"):
        Muon([{"params": [matrix], "algorithm": "sgd"}])
    with pytest.raises(ValueError, match="`eps`"):
        Muon([{"params": [matrix], "algorithm": "adamw", "eps": -1.0}])
    with pytest.raises(ValueError, match="`use_muon` is not a key here"):  # KellerJordan/Muon's
        Muon([{"params": [matrix], "use_muon": False}])


def test_a_scheduler_and_a_closure_work_as_with_any_torch_optimizer() -> None:
    p = nn.Parameter(torch.ones(8, 8))
    optimizer = Muon([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 64.0  # type: ignore[arg-type]
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
