"""What a person sees: a live bar on a terminal, plain lines elsewhere and without rich."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from matilda_train import console

PROGRAM = """
import sys
if "no-rich" in sys.argv:
    sys.modules["rich"] = sys.modules["rich.console"] = sys.modules["rich.progress"] = None
from matilda_train.console import TerminalDisplay
with TerminalDisplay(interval=0.0) as display:
    display.note("resuming at step 40 [from] here")
    display.begin("training", total=100, done=40)
    display.advance(70, "loss 2.5")
    display.note("step 70: held-out")
    display.advance(100, "loss 2.4")
    display.advance(100, "loss 2.4")
"""


def show(*arguments: str, terminal: bool, term: str = "xterm-256color") -> str:
    """What the program writes to standard error, on a terminal of its own or into a pipe."""
    mine, theirs = os.openpty() if terminal else os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stderr=theirs,
        env=os.environ | {"TERM": term, "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                piece = os.read(mine, 4096)
            except OSError:  # how a terminal says that nobody is there any more
                break
            if not piece:
                break
            said += piece
        os.close(mine)
    assert process.returncode == 0
    return said.decode()


def test_a_terminal_gets_a_bar_that_begins_where_the_run_resumed() -> None:
    said = show(terminal=True)
    assert "\x1b[" in said
    assert "resuming at step 40 [from] here" in said
    assert "70 %" in said
    assert "step 70: held-out" in said


@pytest.mark.parametrize(
    ("arguments", "terminal", "term"),
    [((), False, "xterm"), (("no-rich",), True, "xterm"), ((), True, "dumb")],
)
def test_others_get_plain_lines(arguments: tuple[str, ...], terminal: bool, term: str) -> None:
    said = show(*arguments, terminal=terminal, term=term)
    assert "\x1b" not in said
    lines = said.split("\n")
    assert lines[0].strip() == "resuming at step 40 [from] here"
    assert lines[1].startswith("training  70 %  loss 2.5  ETA –")
    assert lines[2].strip() == "step 70: held-out"
    assert lines[3].startswith("training 100 %")
    assert [line.strip() for line in lines[4:]] == [""], "the end is told once"


def test_the_time_left_does_not_count_what_came_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    display = console.TerminalDisplay()
    display.begin("training", total=100, done=40)
    for at, done in ((500, 41), (510, 51), (520, 71), (530, 100)):  # 500 s of compiling
        now[0] = at
        display.advance(done, "·")
    said = [line.split("ETA ")[1] for line in capfd.readouterr().err.splitlines()]
    assert said == ["–", "0:49", "0:19", "0:00"]


def test_no_display_ends_its_program_for_want_of_room() -> None:
    program = """
import os
from matilda_train.ablation.display import StudyTerminal
from matilda_train.console import TerminalDisplay
for display in (TerminalDisplay(interval=0.0), StudyTerminal(interval=0.0)):
    with display:
        display.note("nobody reads this")
os._exit(0)  # else Python itself fails at what is left
"""
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        assert subprocess.run([sys.executable, "-c", program], stderr=full).returncode == 0
