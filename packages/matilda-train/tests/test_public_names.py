"""What the package shows of itself before anything of it is used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["matilda_train", "matilda_train.evals"])
def test_every_public_name_is_listed_without_importing_torch(name: str) -> None:
    shown = f"import sys, {name} as module; print(*dir(module)); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module = importlib.import_module(name)
    assert done.stdout.split() == sorted(module.__all__)
    for public in dir(module):
        assert hasattr(module, public)
