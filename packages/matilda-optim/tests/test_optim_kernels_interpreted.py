"""The Triton kernels against the reference back end, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

MISSING = [name for name in ("triton", "numpy") if importlib.util.find_spec(name) is None]
OLD = not MISSING and tuple(map(int, version("triton").split(".")[:2])) < (3, 9)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING) or OLD,
        reason="needs numpy and the interpreter of Triton 3.9; older ones fail with recent numpy",
    ),
]

PROGRAM = """
import torch
from matilda_optim import Muon
import matilda_optim.backends as backends
backends.kernels_available = lambda device: True
torch.manual_seed(0)
shapes = [(64, 64), (40, 72), (72, 40), (128, 64)]
start = [torch.randn(s) for s in shapes]
for options in (
    {},
    {"nesterov": False, "maximize": True, "cautious": True, "nonfinite": "skip"},
):
    options = {"lr": 0.02, "ns_coefficients": "polar_express", "ns_dtype": "float16"} | options
    ours = [torch.nn.Parameter(t.clone()) for t in start]
    theirs = [torch.nn.Parameter(t.clone()) for t in start]
    def group(params):
        return [{"params": params[:-1]}, {"params": params[-1:], "split": (64, 64)}]
    a = Muon(group(ours), **options)
    b = Muon(group(theirs), **options, backend="reference")
    for step in range(2 if options else 1):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        if "nonfinite" in options:
            ours[1].grad[3, 5] = theirs[1].grad[3, 5] = float("nan")
        a.step()
        b.step()
    assert a._muon_step._split[0], "the kernels did not run"
    for p, q, t in zip(ours, theirs, start):
        m, n = a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"]
        assert torch.allclose(m, n, rtol=1e-5, atol=1e-6), (options, p.shape)
        moved = (q - t).norm()
        assert (p - q).norm() <= 0.05 * moved + 1e-6, (options, p.shape, (p - q).norm() / moved)
options = {"lr": 0.02, "ns_coefficients": "polar_express", "ns_dtype": "float16"}
# no sampled tile sees this gradient's large entries: the copies to fp16 are made again
for size in (1.0, 1e-30, 1e30):
    p, q = (torch.nn.Parameter(torch.zeros(64, 1280)) for _ in range(2))
    p.grad = torch.zeros(64, 1280)
    p.grad[:, :64] = 1e-5 * size * torch.randn(64, 64)
    p.grad[:, 256:320] = size * torch.randn(64, 64)
    q.grad = p.grad.clone()
    Muon([p], **options).step()
    Muon([q], **options, backend="reference").step()
    assert (p - q).norm() <= 0.05 * q.norm(), (size, (p - q).norm() / q.norm())
print("equal")
"""


def test_kernels_equal_the_reference_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "equal"
