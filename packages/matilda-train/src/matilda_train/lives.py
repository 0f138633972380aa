"""Lives: processes that train a run until a planned fault ends them, and what they write down.

A life is forked from a process that has imported torch but run nothing, which takes milliseconds,
or starts afresh as a user's command does, which is what a GPU and a time account want. It appends
to its log what it begins to do, when, and a digest of the whole state in memory at every save and
after every restore, so that the state two processes hold at a resume point can be compared.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matilda_train.metrics_log import read_rows

if TYPE_CHECKING:
    from matilda_train.stop_signals import StopRequest

__all__ = ["Fault", "Life", "Nursery", "live", "live_afresh", "serve_lives"]

SERVER_PROGRAM = "from matilda_train.lives import serve_lives; serve_lives()"
AFRESH_PROGRAM = """
from matilda_train.stop_signals import StopRequest
STOP = StopRequest().install()
print("ready", flush=True)
from matilda_train.lives import live_afresh
live_afresh(STOP)
"""


MACHINE_CACHES = (
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME", "CUDA_CACHE_PATH"),
    *("QUACK_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"),
)
"""Environment variables that say where compilers keep what they made."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A signal that a life is to receive."""

    signal: str
    """`SIGKILL` or `SIGTERM`."""

    phase: str
    """At the beginning of this phase; `importing`: counted from the start of the process."""

    occurrence: int = 1
    """Earliest time the phase is met in this life, counted from 1."""

    at_step: int = 0
    """Not before the run has come this far."""

    delay_ms: float = 0.0
    """Later by this, wherever the process is by then."""


@dataclass(frozen=True, kw_only=True)
class Life:
    """How a life ended."""

    code: int
    """Exit code, negative for the signal that ended it."""
    began: float
    """`time.monotonic` of the start of the process."""
    ended: float
    records: list[dict[str, Any]]
    """What it wrote: `{"t", "phase"}`, `{"saved" or "restored", "digest"}`, `{"fired"}`."""

    @property
    def phase(self) -> str:
        """What it was doing when its fault came to pass, or last."""
        phase = "importing"
        for record in self.records:
            if "fired" in record:
                break
            phase = record.get("phase", phase)
        return phase

    @property
    def seconds_to_first_step(self) -> float | None:
        """From the start of the process to the end of its first step, compiling included."""
        ends = (record["t"] for record in self.records if record.get("phase") == "training")
        end = next(ends, None)
        return None if end is None else end - self.began

    @property
    def resumed(self) -> bool:
        """Whether it went on from a checkpoint."""
        return any("restored" in record for record in self.records)

    @property
    def fired(self) -> bool:
        """Whether its fault came to pass."""
        return any("fired" in record for record in self.records)


class Nursery:
    """Brings up lives, one at a time, forked or `afresh`; what they print goes to `output`."""

    def __init__(self, output: Path, *, afresh: bool) -> None:
        self._output = output
        self._is_afresh = afresh
        self._server: subprocess.Popen[str] | None = None

    def run(self, request: Mapping[str, Any], log: Path, fault: Fault | None = None) -> Life:
        """One life of the run that `request` names (config, set, run_dir, data_dir).

        Its compilers' caches lie in `caches`, if that is named too, instead of the machine's.
        """
        request = {
            **request,
            "fault": asdict(fault) if fault else None,
            "output": str(self._output),
            "log": str(log),
        }
        began = time.monotonic()
        early = fault is not None and fault.phase == "importing"
        code = self._afresh(request) if early or self._is_afresh else self._forked(request)
        ended = time.monotonic()
        records = read_rows(log)
        if fault is not None and early and code != 0:
            records.append({"fired": fault.signal})
        return Life(code=code, began=began, ended=ended, records=records)

    def last_words(self) -> str:
        """The end of what lives have printed."""
        if not self._output.exists():
            return ""
        return self._output.read_text(encoding="utf-8", errors="replace")[-2000:]

    def close(self) -> None:
        """End the server; no life is running between two requests."""
        if self._server is not None:
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            self._server.stdin.close()
            self._server.wait()
            self._server.stdout.close()

    def _forked(self, request: Mapping[str, Any]) -> int:
        self._server = self._server or _start(SERVER_PROGRAM)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(json.loads(self._server.stdout.readline()))

    def _afresh(self, request: Mapping[str, Any]) -> int:
        with self._output.open("ab") as output:
            process = _start(AFRESH_PROGRAM, stderr=output)
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"A life could not begin; it said: {self.last_words()}")
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        fault = request["fault"]
        if fault is not None and fault["phase"] == "importing":
            time.sleep(fault["delay_ms"] / 1e3)
            process.send_signal(getattr(signal, fault["signal"]))
        code = process.wait()  # its input stays open until then: it ends with this process
        process.stdin.close()
        process.stdout.close()
        return code


def _start(program: str, stderr: Any = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def serve_lives() -> None:
    """Main function of the process that lives are forked from: a request and a code a line."""
    import torch._dynamo  # noqa: F401  (torch's optimizers load it on first use, for seconds)

    import matilda_train.loop  # noqa: F401  (torch is loaded once, for all lives)
    from matilda_train.stop_signals import StopRequest

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            live(request, StopRequest().install())
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])), flush=True)


def live_afresh(stop: StopRequest) -> None:
    """Main function of a life that is a process of its own; never returns."""
    live(json.loads(sys.stdin.readline()), stop)


def live(request: Mapping[str, Any], stop: StopRequest) -> None:
    """One life of a run; never returns."""
    code = 70
    if request.get("caches"):
        os.environ.pop("TRITON_CACHE_DIR", None)  # it would overrule two of these
        os.environ.update({name: f"{request['caches']}/{name}" for name in MACHINE_CACHES})
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _end_with_parent()
        code = _train(request, stop)
    except ValueError as error:
        code = 2
        os.write(2, f"{error}\n".encode())
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _end_with_parent() -> None:
    """Have this process killed once nobody waits for it: it would be in its successor's way."""

    def wait() -> None:
        orders = select.poll()
        orders.register(0, 0)  # the other end of standard input being closed is told unasked
        orders.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _train(request: Mapping[str, Any], stop: StopRequest) -> int:
    import matilda_train.loop as loop
    from matilda_ckpt import Checkpointer, Restored, SaveHandle
    from matilda_train.config_load import load_config
    from matilda_train.state_digest import digest
    from matilda_train.stop_signals import EXIT_PREEMPTED

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    fault = Fault(**request["fault"]) if request["fault"] else None
    met: Counter[str] = Counter()
    step, current, fired = 0, "", False

    def note(**record: Any) -> None:
        os.write(log, (json.dumps({"t": time.monotonic(), **record}) + "\n").encode())

    def fire() -> None:
        assert fault is not None
        note(fired=fault.signal)
        os.kill(os.getpid(), getattr(signal, fault.signal))

    def on_phase(phase: str) -> None:
        nonlocal step, current, fired
        if phase != current:
            note(phase=phase)
        step += current in ("warming up", "training")
        current = phase
        met[phase] += 1
        if fired or fault is None or phase != fault.phase:
            return
        if met[phase] >= fault.occurrence and step >= fault.at_step:
            fired = True
            if fault.delay_ms == 0:
                fire()
                return
            # The timer's thread signals the process, wherever its main thread is by then.
            timer = threading.Timer(fault.delay_ms / 1e3, fire)
            timer.daemon = True
            timer.start()

    class Witness(Checkpointer):
        """Writes down what state the process holds when it saves and after it has restored."""

        def save(self, step: int, state: Mapping[str, object], **options: Any) -> SaveHandle:
            note(saved=step, digest=digest(state))
            return super().save(step, state, **options)

        def restore(self, into: Mapping[str, object], **options: Any) -> Restored | None:
            restored = super().restore(into, **options)
            if restored is not None:
                note(restored=restored.step, digest=digest(into))
                began_at(restored.step)
            return restored

    def began_at(restored: int) -> None:
        nonlocal step
        step = restored

    vars(loop)["Checkpointer"] = Witness
    stop.begin()
    result = loop.train(
        load_config(request["config"], request["set"]),
        run_dir=request["run_dir"],
        data_dir=request["data_dir"],
        stop=lambda: bool(stop),
        on_phase=on_phase,
    )
    return EXIT_PREEMPTED if result.status == "preempted" else 0
