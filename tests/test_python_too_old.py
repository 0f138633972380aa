"""A Python that cannot run an app is told so in one sentence, whatever Python it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
APPS = sorted((ROOT / "apps").glob("[a-z]*.py"))


def old_python() -> str | None:
    """A Python from 3.7 to 3.10, if this machine has one that starts."""
    for minor in (10, 9, 8, 7):
        installed = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        for found in (*map(str, installed), shutil.which(f"python3.{minor}")):
            if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
                return found
    return None


def said_by(python: str, app: Path, *options: str) -> str:
    """What `python app.py` says without any package; it must be one line, and exit code 2."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, *options, str(app)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_an_old_python_is_named() -> None:
    python = old_python()
    if python is None:
        pytest.skip("no Python 3.7 to 3.10 on this machine")
    for app in APPS:
        assert "Matilda needs Python 3.11 or newer, and this is 3." in said_by(python, app)


def test_missing_packages_are_named() -> None:
    for name in ("train", "generate"):
        line = said_by(sys.executable, ROOT / "apps" / f"{name}.py", "-S")
        assert "has no `matilda_train`; give the command as `uv run " in line


def test_every_app_asks_first() -> None:
    for app in APPS:
        lines = app.read_text().splitlines()
        ask = next(i for i, line in enumerate(lines) if line.startswith("import _environment"))
        before = [line for line in lines[:ask] if line.startswith(("import", "from"))]
        assert all(f" {name}" not in line for line in before for name in ("matilda", "numpy"))
