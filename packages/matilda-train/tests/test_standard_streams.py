"""Programs whose standard streams are closed, of another alphabet, or no longer read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SETTLED = "from matilda_train.standard_streams import settle_streams; settle_streams()"


def python(program: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_nothing_that_is_opened_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    said = tmp_path / "said"
    program = (
        f"{SETTLED}; import os, sys; file = open({str(said)!r}, 'w'); print('lost');"
        "print('lost', file=sys.stderr); sys.stdin.read(); os.write(2, b'lost');"
        "file.write(str(file.fileno()))"
    )
    assert python(program, preexec_fn=lambda: os.closerange(0, 3)).returncode == 0
    assert int(said.read_text()) > 2


def test_text_beyond_the_alphabet_of_a_stream_is_said_all_the_same() -> None:
    program = f"{SETTLED}; import sys; print('→'); print('→', file=sys.stderr)"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = python(program, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, done.stdout)
    assert "\\u2192" in done.stdout


def test_reader_that_has_had_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = "from matilda_train.app import run_app; run_app(lambda: print('x' * 99999) or 0)"
    done = python(program, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
