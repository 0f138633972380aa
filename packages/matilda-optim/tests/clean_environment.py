"""Trains outside this repository: a fresh environment with torch and the built wheel alone.

python tests/clean_environment.py [--torch SPEC] [--extra NAME…]

Builds the wheel, makes a virtual environment in a temporary folder, installs the wheel (which
pulls torch), imports every module, runs the README's blocks, then trains a small ConvNet and, when
it was named as an extra, a small `transformers` model. Needs `uv`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent

PROGRAM = r"""
import importlib, importlib.util, pkgutil, re, sys
import torch
import matilda_optim
from matilda_optim import Muon, param_groups

for module in pkgutil.iter_modules(matilda_optim.__path__):
    if module.name.startswith("triton_") and importlib.util.find_spec("triton") is None:
        continue
    importlib.import_module(f"matilda_optim.{module.name}")
print("imported every module from", matilda_optim.__path__[0])

for block in re.findall(r"```python\n(.*?)```", open(sys.argv[1]).read(), re.S):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
print("ran the README's blocks")


def train(model, loss_of, steps=60, lr=1e-2):
    optimizer = Muon(param_groups(model, lr=lr, weight_decay=0.01))
    losses = []
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    return f"{losses[0]:.3f} -> {losses[-1]:.3f}"


torch.manual_seed(0)
x, y = torch.randn(64, 3, 16, 16), torch.randint(0, 10, (64,))
conv = torch.nn.Sequential(
    torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, stride=2),
    torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(10),
)
conv(x)
print("ConvNet", train(conv, lambda: torch.nn.functional.cross_entropy(conv(x), y)))

if importlib.util.find_spec("transformers") is not None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    gpt = GPT2LMHeadModel(config)
    ids = torch.randint(0, 128, (8, 32))
    print("transformers GPT-2", train(gpt, lambda: gpt(input_ids=ids, labels=ids).loss))
else:
    print("transformers is not installed: skipped")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", default="torch", help="requirement, e.g. torch==2.11.*")
    parser.add_argument("--extra", nargs="*", default=[], help="packages to install beside it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("uv", "build", "-q", "--wheel", "--out-dir", str(folder), str(PACKAGE))
        wheel = next(folder.glob("*.whl"))
        run("uv", "venv", "-q", "--python", sys.executable, str(folder / "env"))
        python = str(folder / "env" / "bin" / "python")
        run("uv", "pip", "install", "-q", "--python", python, str(wheel), args.torch, *args.extra)
        run(python, "-W", "ignore", "-c", PROGRAM, str(PACKAGE / "README.md"), cwd=folder)


def run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd)


if __name__ == "__main__":
    main()
