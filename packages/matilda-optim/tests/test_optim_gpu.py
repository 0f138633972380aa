"""The properties again, on a GPU, through the Triton back end."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matilda_optim import Muon, lr_ratio, resolve_coefficients

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0"),
]

SHAPES = [
    (768, 768),
    (256, 768),
    (768, 256),
    (64, 64),
    (48, 960),
    (100, 333),
    (17, 33),
    (512, 2048),
]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def update(grad: Tensor, **options: Any) -> Tensor:
    """orthogonalize(grad) as one step from zero makes it."""
    p = nn.Parameter(torch.zeros_like(grad))
    p.grad = grad.clone()
    settings = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "backend": "triton"}
    Muon([p], **{"ns_coefficients": "polar_express", **settings, **options}).step()
    return -p.detach() / lr_ratio(None, *grad.shape)


def exact(grad: Tensor) -> Tensor:
    u, s, vt = torch.linalg.svd(grad.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s)
    for a, b, c in resolve_coefficients("polar_express", 5):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def parameters(
    shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> list[nn.Parameter]:
    return [nn.Parameter((scale * randn(*s, seed=i)).to(dtype)) for i, s in enumerate(shapes)]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = randn(*p.shape, seed=1000 * step + i, dtype=p.dtype)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device in here raises RuntimeError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(
    options: dict[str, Any], steps: int = 5, shapes: list[tuple[int, int]] = SHAPES
) -> list[Tensor]:
    params = parameters(shapes)
    optimizer = Muon(params, lr=0.02, ns_coefficients="polar_express", **options)
    for step in range(steps):
        set_grads(params, step)
        optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "limit"), [("float16", 0.02), ("bfloat16", 0.12)])
def test_kernels_match_the_float64_polynomial(
    shape: tuple[int, int], dtype: str, limit: float
) -> None:
    g = randn(*shape)
    want = exact(g)
    assert (update(g, ns_dtype=dtype).double() - want).norm() / want.norm() < limit


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_the_gram_form_keeps_steep_spectra(power: float) -> None:
    u = torch.linalg.qr(randn(256, 256).double()).Q
    v = torch.linalg.qr(randn(1024, 256, seed=1).double()).Q
    g = ((u * torch.arange(1, 257, device="cuda").double() ** -power) @ v.T).float()
    want = exact(g)
    assert (update(g).double() - want).norm() / want.norm() < 0.05


def test_runs_are_equal_bit_for_bit() -> None:
    for a, b in zip(run({}), run({}), strict=True):
        assert torch.equal(a, b)


def test_a_matrix_alone_equals_itself_inside_a_batch_bitwise() -> None:
    many = run({}, shapes=[(256, 768)] * 36)
    few = run({}, shapes=[(256, 768)] * 5)
    for a, b in zip(few, many, strict=False):
        assert torch.equal(a, b)


def test_its_own_graph_changes_no_bit_under_a_moving_learning_rate() -> None:
    for a, b in zip(run({"graph": True}, 6), run({}, 6), strict=True):
        assert torch.equal(a, b)


def test_a_captured_step_follows_a_learning_rate_on_the_device() -> None:
    eager = run({}, 6)
    params = parameters(SHAPES)
    lr = torch.zeros((), device="cuda")
    optimizer = Muon(params, lr=lr, ns_coefficients="polar_express")
    set_grads(params, 0)
    lr.fill_(0.02)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(1, 6):
        for i, p in enumerate(params):
            assert p.grad is not None
            p.grad.copy_(randn(*p.shape, seed=1000 * step + i))
        lr.fill_(0.02 / (step + 1))
        graph.replay()
    for a, p in zip(eager, params, strict=True):
        assert (a - p).norm() / a.norm() < 1e-5


OPTIONS: list[dict[str, Any]] = [{}, {"nesterov": False}, {"maximize": True}, {"cautious": True}]


# 16-bit parameters start small here, as weights do: at N(0, 1) bf16 absorbs most of each update,
# and the two back ends differ by which entries happen to round. The next test takes large ones.
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("options", OPTIONS)
def test_kernels_follow_the_reference_back_end(
    dtype: torch.dtype, scale: float, options: dict[str, Any]
) -> None:
    ours, theirs, start = (parameters(SHAPES, dtype, scale) for _ in range(3))
    a = Muon(ours, lr=0.02, ns_coefficients="polar_express", **options)
    b = Muon(theirs, lr=0.02, ns_coefficients="polar_express", backend="reference", **options)
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        a.step()
        b.step()
    for p, q, s in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(
            a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"], rtol=1e-5, atol=1e-6
        )
        assert (p - q).float().norm() / (q - s).float().norm() < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_entry_follows_the_update_rule(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Each entry of every parameter, given the update that the kernels themselves make."""
    lr, decay = 0.02, 0.4
    ours = parameters(SHAPES, dtype)
    probes = [nn.Parameter(torch.zeros_like(p, dtype=torch.float32)) for p in ours]
    a = Muon(ours, lr=lr, weight_decay=decay, ns_coefficients="polar_express", **options)
    b = Muon(probes, lr=1.0, weight_decay=0.0, ns_coefficients="polar_express", **options)
    for step in range(3):
        set_grads(ours, step)
        for p, probe in zip(ours, probes, strict=True):
            assert p.grad is not None
            probe.grad = p.grad.float()
            probe.detach().zero_()
        before = [p.detach().float().clone() for p in ours]
        a.step()
        b.step()
        for p, probe, start in zip(ours, probes, before, strict=True):
            shrinks = (start * -probe > 0) | (not options.get("cautious", False))
            want = torch.where(shrinks, start * (1 - lr * decay), start) + lr * probe.detach()
            if dtype == torch.float32:
                torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-7)
            else:  # one unit in the last place, and that only at ties
                torch.testing.assert_close(p.detach(), want.to(dtype), rtol=2**-7, atol=1e-7)
                assert (p != want.to(dtype)).float().mean() < 1e-3


@pytest.mark.parametrize("k", [-60, -9, 17, 60])
def test_powers_of_two_change_no_bit(k: int) -> None:
    for shape in ((256, 768), (100, 333)):
        g = randn(*shape)
        assert torch.equal(update(g * 2.0**k), update(g))


@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_a_nan_touches_only_its_matrix(policy: str) -> None:
    shapes = [(256, 768)] * 4
    clean, dirty = parameters(shapes), parameters(shapes)
    start = [p.detach().clone() for p in dirty]
    a = Muon(clean, nonfinite=policy)
    b = Muon(dirty, nonfinite=policy)
    set_grads(clean, 0)
    set_grads(dirty, 0)
    assert dirty[2].grad is not None
    dirty[2].grad[3, 5] = float("nan")
    a.step()
    b.step()
    for i in (0, 1, 3):
        assert torch.equal(clean[i], dirty[i])
    if policy == "skip":
        assert torch.equal(dirty[2], start[2])
        assert not b.state[dirty[2]]["momentum_buffer"].any()
        set_grads(dirty, 1)
        b.step()
        assert dirty[2].isfinite().all()
    else:
        assert dirty[2].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_poisoned_step_under_skip_changes_no_bit_and_waits_for_nothing(
    dtype: torch.dtype,
) -> None:
    matrices = parameters([(256, 768)] * 3, dtype)
    vectors = parameters([(768,), (50304, 64)], dtype)
    groups = [{"params": matrices}, {"params": vectors, "algorithm": "adamw"}]
    optimizer = Muon(groups, nonfinite="skip", graph=True)
    for step in range(4):
        set_grads(matrices, step)
        set_grads(vectors, step)
        optimizer.step()
    tensors = [*matrices, *vectors]
    tensors += [v for p in tensors for v in optimizer.state[p].values()]
    before = [t.detach().clone() for t in tensors]
    poison = torch.tensor(float("nan"), device="cuda")
    for p in (*matrices, *vectors):
        assert p.grad is not None
        p.grad.mul_(poison)
    with no_waiting():
        optimizer.step()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    set_grads(matrices, 9)
    set_grads(vectors, 9)
    optimizer.step()
    assert not any(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_zero_gradients_decay_only_and_missing_ones_change_nothing() -> None:
    params = parameters([(256, 768)] * 3)
    start = [p.detach().clone() for p in params]
    params[0].grad = torch.zeros_like(params[0])
    params[1].grad = randn(256, 768)
    Muon(params, lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(params[0].detach(), start[0] * 0.95)
    assert torch.equal(params[2], start[2])


def test_gradients_are_only_read_and_may_be_unaligned_views() -> None:
    flat = randn(256 * 768 + 1)
    p, q = parameters([(256, 768)]), parameters([(256, 768)])
    p[0].grad = flat[1:].view(256, 768)
    q[0].grad = p[0].grad.clone()
    before = flat.clone()
    Muon(p).step()
    Muon(q).step()
    assert torch.equal(p[0], q[0])
    assert torch.equal(flat, before)


def test_offsets_beyond_two_to_the_31_are_right() -> None:
    if torch.cuda.mem_get_info()[0] < 50 * 2**30:
        pytest.skip("needs 50 GiB of free device memory")
    stack = torch.zeros(720, 1024, 3072, device="cuda")
    p = nn.Parameter(stack)
    p.grad = torch.zeros_like(stack)
    last = randn(1024, 3072)
    p.grad[-1] = last
    options = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0}
    Muon([{"params": [p], "stacked": True}], ns_coefficients="polar_express", **options).step()
    assert torch.equal(-p[-1].detach(), update(last))
    assert not p[:-1].any()


def test_adamw_groups_equal_torch_adamw_bitwise() -> None:
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    a = Muon([{"params": ours, "algorithm": "adamw"}], lr=1e-3, weight_decay=0.1)
    b = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("default")  # torch.compile's own imports use deprecated parts of torch
def test_a_compiled_train_step_learns_as_the_eager_one() -> None:
    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).cuda()
        hidden = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim < 2]
        optimizer = Muon([{"params": hidden}, {"params": rest, "algorithm": "adamw"}], lr=0.01)
        x = randn(128, 64)

        def train() -> Tensor:
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        step = torch.compile(train) if compiled else train
        return [step().item() for _ in range(30)]

    ours, eager = losses(True), losses(False)
    assert ours[-1] < 0.6 * ours[0]
    assert all(abs(a - b) < 0.01 * b for a, b in zip(ours, eager, strict=True))


def test_matrices_whose_samples_mislead_are_right() -> None:
    for size in (1.0, 1e-30, 1e30):
        g = 1e-6 * size * randn(768, 3072)
        g[640:704, 64:128] += size * randn(64, 64)  # tiles that are no samples
        g[256:320, 1984:2048] += size * randn(64, 64, seed=1)
        want = exact(g)
        assert (update(g).double() - want).norm() / want.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_shards_have_the_bits_of_the_whole_matrix(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    from matilda_optim.triton_shards import (
        WholeMatrices,
        one_ratio,
        shard_directions,
        update_shard,
    )

    ours, parts = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    optimizer = Muon(ours, lr=0.02, ns_coefficients="polar_express", **options)
    group = optimizer.param_groups[0]
    orthogonalize = WholeMatrices()
    momenta = [torch.zeros_like(p, dtype=torch.float32) for p in parts]
    for step in range(3):
        set_grads(ours, step)
        optimizer.step()
        wholes = []
        for p, momentum in zip(ours, momenta, strict=True):
            assert p.grad is not None
            rows = -(-len(p) // 3)
            pieces = shard_directions(group, p.grad.split(rows), momentum.split(rows))
            wholes.append(torch.cat(pieces))
        orthogonalize([(group, whole) for whole in wholes])
        for p, q, whole in zip(ours, parts, wholes, strict=True):
            rows = -(-len(p) // 3)
            ratio = one_ratio(group, p)
            assert ratio is not None
            for shard, piece in zip(q.detach().split(rows), whole.split(rows), strict=True):
                update_shard(group, ratio, shard, piece)
            assert torch.equal(p, q), (step, p.shape)
