"""Every program explains itself by examples, and answers a slip of the keys by the right name."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

import matilda_ckpt.cli
import matilda_data.cli
from killable_runs import TrainServer
from matilda_train.app import (
    EXIT_BAD_INPUT,
    EXIT_DIVERGED,
    EXIT_ENVIRONMENT,
    add_json_option,
    show,
)
from matilda_train.stop_signals import EXIT_PREEMPTED
from matilda_train.watchdog import EXIT_HUNG

ROOT = Path(__file__).resolve().parent.parent
APPS = sorted(path.stem for path in (ROOT / "apps").glob("[a-z]*.py"))
COMMANDS = {"matilda-data": matilda_data.cli.main, "matilda-ckpt": matilda_ckpt.cli.main}


@pytest.mark.parametrize("name", APPS)
def test_an_app_explains_itself_and_mends_slips(
    name: str, server: TrainServer, tmp_path: Path
) -> None:
    app = ROOT / "apps" / f"{name}.py"
    helped = server.run_program(app, ["--help"], tmp_path)
    assert helped.returncode == 0, helped.stderr
    examples = helped.stdout.partition("\nexamples:\n")[2]
    assert re.search(rf"^  uv run (--extra \w+ )?apps/{name}.py ", examples, re.M)
    used = set(re.findall(r"(?<=\s)--[a-z][a-z-]+", examples.split("\n\n")[0]))
    known = set(re.findall(r"(?<=[\s\[])--[a-z][a-z-]+", helped.stdout.partition("examples:")[0]))
    assert used - {"--extra", "--config", "--data-dir", "--run-dir"} <= known

    option = max(known - {"--help"}, key=len)
    slip = option[:-1] + ("q" if option[-1] != "q" else "x")
    slipped = server.run_program(app, [slip, "1"], tmp_path)
    assert slipped.returncode == 2
    assert slipped.stderr == f"error: there is no option `{slip}`; did you mean `{option}`?\n"
    assert slipped.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("report --run X", "give RUN by itself, as `report.py --help` shows."),
        ("report --run-dir X", "give RUN by itself, as `report.py --help` shows."),
        ("report --output X", "did you mean `--out`?"),
        ("ablate --run-dir X", "did you mean `--out`?"),
        ("prepare_text --output X", "did you mean `--out-dir`?"),
        ("generate --run-dir X", "did you mean `--run`?"),
        ("train --out X", "did you mean `--run-dir`?"),
    ],
)
def test_the_name_that_another_program_has_is_understood(
    command: str, said: str, server: TrainServer, tmp_path: Path
) -> None:
    app, option, value = command.split()
    done = server.run_program(ROOT / "apps" / f"{app}.py", [option, value], tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: there is no option `{option}`; {said}\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_explains_itself_and_mends_slips(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            COMMANDS[name](list(arguments))
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    code, out, _ = said("--help")
    assert code == 0
    assert f"\nexamples:\n  {name} " in out
    subcommands = re.findall(r"^    ([a-z-]+)(?=\s|$)", out, re.M)
    assert "verify" in subcommands
    for subcommand in subcommands:
        assert said(subcommand, "--help")[0] == 0
    assert said("verfy", ".") == (2, "", "error: 'verfy' is no command; did you mean `verify`?\n")
    code, _, err = said("verify", "--jsom", ".")
    assert (code, err) == (2, "error: there is no option `--jsom`; did you mean `--json`?\n")
    assert said()[0] == 2
    assert COMMANDS[name](["verify", str(ROOT / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("words", "printed", "written"),
    [
        ([], "a text\n", None),
        (["--json"], '{\n "a": 1\n}\n', None),
        (["--json", "r"], "a text\n", 1),
    ],
)
def test_a_result_is_text_or_json_or_both(
    words: list[str],
    printed: str,
    written: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    add_json_option(parser)
    show("a text", {"a": 1}, parser.parse_args(words).json)
    assert capsys.readouterr().out == printed
    assert [json.loads(file.read_text())["a"] for file in tmp_path.iterdir()] == (
        [written] if written else []
    )


def test_exit_codes_are_those_that_the_readme_tells() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    told = text.partition("Exit codes: ")[2].partition(".")[0]
    codes = [EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_ENVIRONMENT, EXIT_HUNG, EXIT_PREEMPTED]
    assert codes == [2, 3, 4, 5, 75]
    assert re.findall(r"(?:^|; )(\d+) ", told) == ["0", *map(str, codes)]


def test_the_parser_is_the_same_in_the_packages_that_have_it() -> None:
    files = sorted((ROOT / "packages").glob("*/src/*/arguments.py"))
    assert len(files) == 3
    assert len({file.read_text() for file in files}) == 1
