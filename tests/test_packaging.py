"""The five packages as somebody installs them: metadata, declared imports, light imports, names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir())

# Modules whose distribution has another name.
DISTRIBUTION = {
    "cutlass": "quack-kernels",
    "flash_attn": "flash-attn-4",
    "liger_kernel": "liger-kernel",
    "pynvml": "nvidia-ml-py",
    "quack": "quack-kernels",
    "triton": "torch",
}
# Takes a second or more to import, or is an extra.
HEAVY = {"torch", "datasets", "pyarrow", "ray", "wandb", "plotly", "transformers", "s3fs", "rich"}


def project(package: str) -> dict[str, Any]:
    text = (ROOT / "packages" / package / "pyproject.toml").read_text()
    section: dict[str, Any] = tomllib.loads(text)["project"]
    return section


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0] for requirement in requirements}


@pytest.mark.parametrize("package", PACKAGES)
def test_metadata_is_complete(package: str) -> None:
    folder, told = ROOT / "packages" / package, project(package)
    assert told["name"] == package
    assert (folder / told["readme"]).read_text().startswith(f"# {package}\n")
    for file in told["license-files"]:
        assert (folder / file).is_file()
    assert told["license"] == "Apache-2.0"
    assert told["description"].endswith(".")
    assert "Typing :: Typed" in told["classifiers"]
    assert (folder / "src" / package.replace("-", "_") / "py.typed").is_file()
    assert told["requires-python"] == ">=3.11"
    changes = (folder / "CHANGELOG.md").read_text()
    assert f"\n## {told['version']}\n" in changes


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_is_imported_that_is_not_declared(package: str) -> None:
    told = project(package)
    always = names_of(told["dependencies"])
    extras = {
        name for extra in told.get("optional-dependencies", {}).values() for name in names_of(extra)
    }
    own = package.replace("-", "_")
    wrong = []
    for file in sorted((ROOT / "packages" / package / "src").rglob("*.py")):
        for name, lazy in imports(ast.parse(file.read_text(encoding="utf-8")).body, lazy=False):
            if name in sys.stdlib_module_names or name == own:
                continue
            needs = DISTRIBUTION.get(name, name.replace("_", "-"))
            if needs in always or (lazy and needs in extras):
                continue
            wrong.append(f"{file.relative_to(ROOT)} imports {name}" + ("" if lazy else " at once"))
    assert wrong == []


def imports(body: list[ast.stmt], *, lazy: bool) -> Iterator[tuple[str, bool]]:
    """Top-level names that statements import, and whether the module's own import may do without.

    Lazy is what stands in a function, behind a condition or in a `try`.
    """
    for node in body:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield (node.module or "").split(".")[0], lazy
        else:
            inner = lazy or not isinstance(node, ast.ClassDef)
            for field in ("body", "orelse", "finalbody"):
                yield from imports(getattr(node, field, []), lazy=inner)
            for branch in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
                yield from imports(branch.body, lazy=True)


def test_an_undeclared_import_would_be_found() -> None:
    text = "import a\nclass C:\n    import b\ndef f():\n    from c.d import e\n"
    text += "match x:\n    case 1:\n        import g\ntry:\n    x\nexcept E:\n    import h\n"
    found = list(imports(ast.parse(text).body, lazy=False))
    assert found == [("a", False), ("b", False), ("c", True), ("g", True), ("h", True)]


def test_importing_a_package_loads_nothing_heavy() -> None:
    program = "import sys\n" + "".join(
        f"import {package.replace('-', '_')}\n" for package in PACKAGES
    )
    program += "print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"matilda_train", "numpy"} <= set(loaded)
    assert set(loaded) & HEAVY == set()


def test_the_listed_public_names_are_those_of_the_source() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "public_api.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_pages_import_is_listed() -> None:
    imported = {
        (module, name.strip())
        for file in ROOT.rglob("*.md")
        if not {".venv", "api"} & set(file.relative_to(ROOT).parts)
        for module, names in re.findall(
            r"^from (matilda_[\w.]+) import (.+)$", file.read_text(encoding="utf-8"), re.M
        )
        for name in names.split(",")
    }
    assert {module for module, _ in imported} >= {"matilda_ckpt.dcp", "matilda_train.evals"}
    for module, name in imported:
        package = module.split(".")[0].replace("_", "-")
        page = (ROOT / "docs" / "api" / f"{package}.md").read_text(encoding="utf-8")
        begin = f"`from {module} import …`:\n"
        listed = page.partition(begin)[2].partition("\n`from ")[0]
        assert f"\n## `{name}`\n" in listed, f"{module}.{name} is in no list of docs/api"
