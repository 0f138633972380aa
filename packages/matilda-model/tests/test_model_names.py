"""What the package shows of itself before anything of it is used."""

from __future__ import annotations

import subprocess
import sys

import matilda_model

SHOWN = "import sys, matilda_model; print(*dir(matilda_model)); assert 'torch' not in sys.modules"


def test_every_public_name_is_listed_without_importing_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SHOWN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(matilda_model.__all__)
    for name in dir(matilda_model):
        assert hasattr(matilda_model, name)
