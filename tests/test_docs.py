"""What the Markdown files say can be typed: programs, options, config keys, files; and it runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

import matilda_ckpt.cli
import matilda_data.cli
from killable_runs import TrainServer
from markdown_blocks import NEEDS, ROOT, Block, blocks_of, markdown_files
from matilda_train import load_config

FILES = markdown_files()
BLOCKS = [block for file in FILES for block in blocks_of(file)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
OTHERS_PROGRAMS = {"cd", "docker", "git", "pip", "sbatch", "sky"}
PARSERS = {"matilda-ckpt": matilda_ckpt.cli._parser, "matilda-data": matilda_data.cli._parser}


class Programs:
    """What the commands of a block may name, with the options that each has."""

    def __init__(self, server: TrainServer, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self._options: dict[str, set[str]] = {}

    def complaint(self, words: list[str]) -> str | None:
        """What is wrong with a command; None when nothing is."""
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words[:2] == ["uv", "run"]:
            words = words[2:]
            while words[0] == "--extra":
                words = words[2:]
        name, *arguments = words
        program = next((w for w in words if re.fullmatch(r"(apps|benchmarks)/\w+\.py", w)), None)
        if program is not None:
            return self._app_complaint(program, words[words.index(program) + 1 :])
        if name == "launchers/train.sh":
            return self._app_complaint("apps/train.py", arguments)
        if name in PARSERS:
            try:
                PARSERS[name]().parse_args(arguments)
            except SystemExit:
                return f"{name} does not take {arguments}"
            return None
        if name == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
            return None if set(arguments) <= set(targets) else f"no such target: {arguments}"
        if name == "benchmarks/reproduce.sh":
            stages = re.findall(r"^([a-z]+)\(\)", (ROOT / name).read_text(), re.M)
            return None if set(arguments) <= set(stages) else f"no such stage: {arguments}"
        if name in ("pytest", "python"):
            paths = [word for word in arguments if "/" in word and not word.startswith("-")]
            missing = [path for path in paths if not (ROOT / path).exists()]
            return f"no such file: {missing}" if missing else None
        if name.startswith("launchers/"):
            return None if (ROOT / name).is_file() else f"no such file: {name}"
        if name == "uv":
            return None if arguments[0] in ("sync", "pip", "tool") else f"uv {arguments[0]}"
        return None if name in OTHERS_PROGRAMS else f"unknown program {name!r}"

    def _app_complaint(self, program: str, arguments: list[str]) -> str | None:
        if not (ROOT / program).is_file():
            return f"no such file: {program}"
        if program not in self._options:
            helped = self._server.run_program(ROOT / program, ["--help"], self._folder)
            assert helped.returncode == 0, helped.stderr
            self._options[program] = set(re.findall(r"--[a-z][a-z0-9-]*", helped.stdout))
        given = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        unknown = set(given) - self._options[program]
        if unknown:
            return f"{program} has no option {sorted(unknown)}"
        if program.startswith("apps/prepare") or "--config" not in given:
            return None
        config = arguments[arguments.index("--config") + 1]
        overrides = []
        if "--set" in arguments:
            for word in arguments[arguments.index("--set") + 1 :]:
                if word.startswith("--"):
                    break
                overrides.append(word)
        try:
            load_config(ROOT / config, overrides)
        except ValueError as error:
            return str(error)
        return None


def test_every_documented_command_could_be_typed(server: TrainServer, tmp_path: Path) -> None:
    programs = Programs(server, tmp_path)
    complaints = [
        f"{block}: {complaint}"
        for block in SHELL
        for words in block.commands()
        if (complaint := programs.complaint(words)) is not None
    ]
    assert complaints == []
    assert len(SHELL) > 8


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("uv run apps/trian.py --config x", "no such file"),
        ("uv run apps/train.py --confg x", "has no option"),
        ("uv run apps/train.py --config configs/none.json", "does not exist"),
        ("uv run apps/train.py --config configs/quickstart.json --set a.b=1", "a"),
        ("matilda-data verfy data", "does not take"),
        ("make chekc", "no such target"),
        ("benchmarks/reproduce.sh tabel", "no such stage"),
        ("uv run pytest tests/none.py", "no such file"),
        ("matilda --help", "unknown program"),
    ],
)
def test_a_wrong_command_would_be_found(
    command: str, said: str, server: TrainServer, tmp_path: Path
) -> None:
    block = Block(ROOT / "README.md", 1, "sh", frozenset(), command + "\n")
    (words,) = block.commands()
    assert said in (Programs(server, tmp_path).complaint(words) or "")


def test_blocks_are_marked_by_what_is_known() -> None:
    for block in BLOCKS:
        assert block.needs <= NEEDS, block
        assert block.language in ("", "sh", "python", "json", "mermaid", "text"), block
        if block.language == "python":
            compile(block.text, str(block), "exec")


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])
def test_links_and_named_files_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text)
    local = [(file.parent / to, part) for to, part in links if "://" not in to]
    assert [str(to) for to, _ in local if not to.exists()] == []
    parts = [((file if to == file.parent else to), part) for to, part in local if part]
    assert [part for to, part in parts if part not in headings(to)] == []
    named = re.findall(
        r"`((?:apps|benchmarks|configs|docs|launchers|packages|tests)/[\w./-]+)`", text
    )
    places = (ROOT, file.parent)
    assert [name for name in named if not any((at / name).exists() for at in places)] == []


def headings(file: Path) -> set[str]:
    """The names under which GitHub lets one link to the headings of a file."""
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.S)
    titles = [title.lower().replace("`", "") for title in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


# Stands for uv in the world of `world`: runs the program in this interpreter's environment.
UV = """#!/usr/bin/env bash
[ "$1" = run ] || exit 0
shift
while [ "$1" = --extra ]; do shift 2; done
case $1 in *.py) exec python "$@" ;; *) exec "$@" ;; esac
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose reader has followed the README: some text, and a finished quickstart."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("apps", "benchmarks", "configs", "docs", "launchers", "packages", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    for name, text in (("uv", UV), ("pip", "#!/bin/sh\n")):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    for name in ("corpus-edu-000", "corpus-code-000"):
        lines = "".join(
            json.dumps({"text": f"{name} {i}: the heart of the matter. " * 40, "id": i}) + "\n"
            for i in range(400)
        )
        packed = zstandard.ZstdCompressor().compress(lines.encode())
        (folder / f"{name}.jsonl.zst").write_bytes(packed)
    done = type_in(
        folder,
        "uv run apps/train.py --config configs/quickstart.json --set train.total_steps=20 "
        "optim.warmup_steps=2 "
        "train.threads=1 ckpt.every_steps=10 eval.every_steps=10 log.every_steps=1",
    )
    assert done.returncode == 0, done.stdout
    return folder


def environment(folder: Path) -> dict[str, str]:
    programs = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": programs, "OMP_NUM_THREADS": "1"}


def type_in(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """What bash makes of the text in that folder."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


RUNNABLE = [block for block in BLOCKS if block.language in ("sh", "python") and not block.needs]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", [b for b in RUNNABLE if b.language == "sh"], ids=str)
def test_a_shell_block_runs_as_it_stands(block: Block, world: Path) -> None:
    lines = block.text.replace("\\\n", " ").splitlines()
    served = [line for line in lines if "apps/serve.py" in line]
    done = type_in(world, "\n".join(line for line in lines if line not in served))
    assert done.returncode == 0, done.stdout
    for line in served:  # ends by Ctrl-C alone
        command = ["bash", "-c", f"exec {line.replace('uv run', 'python')} --port 0"]
        program = subprocess.Popen(
            command, cwd=world, env=environment(world), stdout=subprocess.PIPE, text=True
        )
        assert program.stdout is not None
        assert "http://127.0.0.1:" in program.stdout.readline()
        time.sleep(0.5)
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=60)
        assert program.returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "file",
    sorted({block.file for block in RUNNABLE if block.language == "python"}),
    ids=lambda file: file.parent.name,
)
def test_the_python_blocks_of_a_file_run_one_after_another(file: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    program = "\n".join(b.text for b in RUNNABLE if b.file == file and b.language == "python")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
