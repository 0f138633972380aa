"""Runs that may be killed, and what is compared between a killed run and its twin."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matilda_train.lives import Nursery
from matilda_train.run_comparison import state_hashes

SERVER = Path(__file__).with_name("train_server.py")


class TrainServer:
    """Runs `matilda_train.train` in forked children; see `train_server.py`."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "train_server.log"
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._reply() == "ready"

    def run(self, config: Path, run_dir: Path, data_dir: Path | None, **fault: Any) -> int:
        """Train until the end or the fault; returns the exit code, negative for a signal."""
        request = {
            "config": str(config),
            "run_dir": str(run_dir),
            "data_dir": str(data_dir) if data_dir else None,
            "log": str(self.log),
            **fault,
        }
        return self.request(request)

    def request(self, request: Mapping[str, Any]) -> int:
        """The exit code of what a child did as the request says."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = self._reply()
        assert isinstance(code, int)
        assert code != 99, self.log.read_text()
        return code

    def run_program(
        self, program: Path, arguments: Sequence[str], cwd: Path, **fault: Any
    ) -> subprocess.CompletedProcess[str]:
        """What `python program arguments…` in `cwd` does, without the seconds of loading torch."""
        with TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            code = self.request(
                {
                    "program": str(program),
                    "arguments": list(arguments),
                    "cwd": str(cwd),
                    "stdout": str(out),
                    "log": str(err),
                    **fault,
                }
            )
            return subprocess.CompletedProcess(
                [str(program), *arguments], code, out.read_text(), err.read_text()
            )

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


class ServedNursery(Nursery):
    """Lives forked from a server that is there already."""

    def __init__(self, server: TrainServer, output: Path) -> None:
        super().__init__(output, afresh=False)
        self._train_server = server

    def _forked(self, request: Mapping[str, Any]) -> int:
        return self._train_server.request({"life": request, "log": request["output"]})


def state_sha256(run_dir: Path) -> str:
    """Hash of everything in a run's newest checkpoint: weights, optimizer, stream, loop, RNG."""
    hashes = json.dumps(state_hashes(run_dir), sort_keys=True)
    return hashlib.sha256(hashes.encode()).hexdigest()
