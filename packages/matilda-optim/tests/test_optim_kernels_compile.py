"""The Triton kernels compile for Hopper, without a GPU, within its limits."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed here"
    ),
]

PROGRAM = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from matilda_optim import triton_kernels as kernels
from matilda_optim.triton_products import apply_config, symmetric_config

def build(kernel, constants, types, warps, stages, products):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    assert built.metadata.shared <= 232448, built.metadata.shared
    assert (ptx.count("wgmma.mma_async") > 0) == products
    assert (ptx.count("cp.async.bulk.tensor") > 0) == products
    print(kernel.__name__)

def block(rows, cols):
    return f"tensordesc<fp16[{rows},{cols}]>"

t, _, k, warps, stages = symmetric_config(768)
tile, operand = block(t, t), block(t, k)
types = {"a_desc": operand, "b_desc": operand, "d_desc": tile, "out_desc": tile}
types |= {"alpha": "fp32", "beta": "fp32", "gamma": "fp32", "factors": "*fp32"}
for scaled in (True, False):
    constants = {"ADD": not scaled, "SCALED": scaled, "TILE": t, "BLOCK_K": k}
    build(kernels.symmetric_kernel, constants, types, warps, stages, True)

m, n, k, warps, stages = apply_config(768, 3072)
types = {"q_desc": block(m, k), "x_desc": block(k, n), "out_desc": block(m, n // 2)}
types |= {"factors": "*fp32"}
constants = {"TILE_M": m, "TILE_N": n, "BLOCK_K": k, "PROGRAMS": 132, "HALVES": True}
for scaled in (True, False):
    build(kernels.apply_kernel, constants | {"SCALED": scaled}, types, warps, stages, True)

tables = {"grad_ptrs": "*i64", "momentum_ptrs": "*i64", "param_ptrs": "*i64", "shapes": "*i32"}
tables |= {"hyper": "*fp32", "x": "*fp16", "o": "*fp16", "partial": "*fp64", "norms": "*fp64"}
tables |= {"samples": "*fp64", "factors": "*fp32"}
for even in (True, False):
    constants = {"TILE": 64, "EVEN": even}
    source = constants | {"GRAD": tl.float32, "NESTEROV": even}
    build(kernels.sample_kernel, source, tables, 4, 3, False)
    source |= {"SKIP": not even, "SAMPLES_POW2": 16 if even else 1024}
    build(kernels.gather_kernel, source, tables, 4, 3, False)
    build(kernels.settle_kernel, source | {"TILES_POW2": 1024}, tables, 4, 3, False)
    constants |= {"SKIP": not even, "PARAM": tl.bfloat16, "CAUTIOUS": not even}
    build(kernels.update_kernel, constants, tables, 4, 3, False)
"""


def test_kernels_compile_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == 12
