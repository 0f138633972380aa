"""The public names of every package, as pages under docs/api, read from the source.

    python .ci/public_api.py            say what differs from docs/api; exit code 1 if anything
    python .ci/public_api.py --write    write docs/api anew

A changed page in a commit is a changed interface: see to the changelog of its package.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "api"
PACKAGES = ("model", "optim", "data", "ckpt", "train")
# What is public beside the package's own names, because it imports what the others do without.
MODULES = {"ckpt": ("dcp",), "train": ("evals",)}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def page(package: str) -> str:
    """The page of `matilda-{package}`."""
    module = f"matilda_{package}"
    parts = [
        f"# matilda-{package}",
        f"Made by `make api` from the source. `from {module} import …`:",
        *names_of(module),
    ]
    for inner in MODULES.get(package, ()):
        parts += [f"`from {module}.{inner} import …`:", *names_of(f"{module}.{inner}")]
    return "\n\n".join(parts) + "\n"


def names_of(module: str) -> Iterator[str]:
    """A section for each public name of `module`."""
    tree = parsed(module)
    homes = imported_from(tree)
    for name in sorted(exported(tree), key=str.lower):
        home, original = homes.get(name, (module, name))
        yield "\n\n".join(described(name, definition(home, original)))


def parsed(module: str) -> ast.Module:
    folder = ROOT / "packages" / module.split(".")[0].replace("_", "-") / "src"
    path = folder.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def exported(tree: ast.Module) -> list[str]:
    """What `__all__` names."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise SystemExit("error: a public module without `__all__`")


def imported_from(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Module and original name of each imported name, those for type checkers included."""
    return {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def definition(module: str, name: str) -> Definition:
    """Where `name` is defined, imports followed; of overloads the one with a body."""
    tree = parsed(module)
    found: Definition | None = None
    for node in tree.body:
        if isinstance(node, Definition) and name in defined_by(node):
            found = node
    if found is not None:
        return found
    homes = imported_from(tree)
    if name not in homes:
        raise SystemExit(f"error: `{name}` is in `__all__` but not defined in {module}")
    return definition(*homes[name])


def defined_by(node: Definition) -> list[str]:
    """The names that a statement gives a value."""
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return [ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else node.name]


def described(name: str, node: Definition) -> Iterator[str]:
    """Heading, signature and first paragraph of one name."""
    yield f"## `{name}`"
    if isinstance(node, ast.ClassDef):
        yield code("\n".join(class_lines(node)))
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield code(signature(node))
    else:
        annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        value = ast.unparse(node.value) if node.value is not None else ""
        yield code(f"{name}{': ' if annotation else ''}{annotation} = {shortened(value)}")
        return
    summary = (ast.get_docstring(node) or "").split("\n\n")[0]
    if summary:
        yield summary


def class_lines(node: ast.ClassDef) -> Iterator[str]:
    """Bases, fields and public methods that the class itself defines."""
    decorators = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    bases = ", ".join(map(ast.unparse, node.bases))
    yield from decorators
    yield f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and not ast.unparse(item.target).startswith("_"):
            value = "" if item.value is None else f" = {shortened(ast.unparse(item.value))}"
            yield f"    {ast.unparse(item.target)}: {ast.unparse(item.annotation)}{value}"
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and (
            not item.name.startswith("_") or item.name in ("__init__", "__call__")
        ):
            if any(ast.unparse(d).endswith(".setter") for d in item.decorator_list):
                continue
            for decorator in item.decorator_list:
                yield f"    @{ast.unparse(decorator)}"
            yield "    " + signature(item).replace("\n", "\n    ")


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """`def name(arguments) -> result`, an argument a line where it would be too long."""
    arrow = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    line = f"{kind} {node.name}({ast.unparse(node.args)}){arrow}"
    if len(line) <= 96:
        return line
    return f"{kind} {node.name}(\n" + "".join(f"    {a},\n" for a in arguments(node)) + f"){arrow}"


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Each argument as it is written."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    for place, (argument, default) in enumerate(
        zip(positional, [*defaults, *given.defaults], strict=True), start=1
    ):
        yield one_argument(argument, default)
        if place == len(given.posonlyargs):
            yield "/"
    if given.vararg:
        yield "*" + ast.unparse(given.vararg)
    elif given.kwonlyargs:
        yield "*"
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        yield one_argument(argument, default)
    if given.kwarg:
        yield "**" + ast.unparse(given.kwarg)


def one_argument(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + ("" if default is None else f" = {ast.unparse(default)}")


def shortened(text: str) -> str:
    return text if len(text) <= 80 else "…"


def code(text: str) -> str:
    return f"```text\n{text}\n```"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/api anew")
    write = parser.parse_args().write
    stale = []
    for package in PACKAGES:
        file = PAGES / f"matilda-{package}.md"
        new = page(package)
        if not file.exists() or file.read_text(encoding="utf-8") != new:
            stale.append(file.relative_to(ROOT))
            if write:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(new, encoding="utf-8")
    verb = "wrote" if write else "public names differ from"
    for file in stale:
        print(f"{verb} {file}")
    if stale and not write:
        print("Meant so? Then: make api, and a line in the package's CHANGELOG.md.")
    return 1 if stale and not write else 0


if __name__ == "__main__":
    sys.exit(main())
