"""Runs trainings in children forked from one process that has imported torch but run nothing.

Started by `killable_runs.TrainServer`: a JSON request a line on stdin, a reply a line on stdout. A
run may have several ranks; faults strike all of them or `only_rank`, and the code is what all agree
on, or, with `first_only`, that of the first to end: a launcher kills the others then. A child may
be told to kill itself with SIGKILL at its n-th fsync, which reaches into the middle of a save, or
at its n-th training step, or to send itself a signal there or where a phase begins.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch._dynamo  # noqa: F401  (torch's optimizers load it on first use, for seconds)

import matilda_train.loop  # noqa: F401  (loads torch once, for all children)
from matilda_train.lives import live
from matilda_train.stop_signals import StopRequest


def run(request: dict[str, Any]) -> int:
    from matilda_train import load_config, train
    from matilda_train.app import run_app

    stop = StopRequest().install().begin()
    arm(request)
    code = 0

    def main() -> int:
        config = load_config(request["config"], request.get("set", []))
        result = train(
            config,
            run_dir=request["run_dir"],
            data_dir=request.get("data_dir"),
            stop=lambda: bool(stop),
            on_phase=signal_at_phase(request) if "at_phase" in request else None,
        )
        return 75 if result.status == "preempted" else 0

    try:
        run_app(main)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return code


def arm(request: dict[str, Any]) -> None:
    """Plant the fault that the request asks for."""
    import matilda_train.loop as loop

    if "poisoned_samples" in request:
        poison_samples(*request["poisoned_samples"])  # the data of every rank
    rank = int(os.environ.get("RANK", "0"))
    if request.get("only_rank", rank) != rank:
        return
    number = getattr(signal, request.get("signal", "SIGKILL"))

    def strike() -> None:
        os.kill(os.getpid(), number)

    if "at_fsync" in request:
        os.fsync = at_nth(request["at_fsync"], os.fsync, strike)
    if "at_step" in request:
        loop.clip_gradients = at_nth(request["at_step"], loop.clip_gradients, strike)
    if "at_evaluation" in request:
        loop.evaluate = at_nth(request["at_evaluation"], loop.evaluate, strike)
    if "slow_seconds" in request:
        loop.BatchReader.read = delayed(loop.BatchReader.read, request["slow_seconds"])
    if "fifo_at_read" in request:
        stall_reader(request["fifo"], request["fifo_at_read"])
    if "flip_at_step" in request:
        step, shard = request["flip_at_step"], request["shard"]
        loop.clip_gradients = at_nth(step, loop.clip_gradients, lambda: flip_bit(shard))
    if "clock_jumps" in request:
        make_clock_jump()
    for step in request.get("nan_at_steps", []):
        plant_nan(loop, step)
    if "inf_in_weights_at_step" in request:
        plant_inf_in_weights(loop, request["inf_in_weights_at_step"])
    if "at_event" in request:
        signal_at_event(loop, number, **request["at_event"])
    if "nan_in_forward" in request:
        plant_nan_in_forward(loop, **request["nan_in_forward"])
    if "nan_in_backward" in request:
        plant_nan_in_backward(loop, **request["nan_in_backward"])


def signal_at_phase(request: dict[str, Any]) -> Callable[[str], None]:
    """What sends this process the signal when the phase begins for the n-th time (`occurrence`)."""
    left = request.get("occurrence", 1)

    def on_phase(phase: str) -> None:
        nonlocal left
        left -= phase == request["at_phase"]
        if phase == request["at_phase"] and left == 0:
            os.kill(os.getpid(), getattr(signal, request["signal"]))

    return on_phase


def at_nth(n: int, function: Any, fault: Callable[[], None]) -> Any:
    """`function`, before whose n-th call something happens."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            fault()
        return function(*args, **kwargs)

    return counted


def flip_bit(shard: str) -> None:
    """Change one token of a shard on the disk, behind the reader's back."""
    with Path(shard).open("r+b") as file:
        file.seek(1024 + 100)
        byte = file.read(1)[0]
        file.seek(1024 + 100)
        file.write(bytes([byte ^ 1]))


def make_clock_jump() -> None:
    """Have every look at the calendar clock find it a day off, in turn ahead and behind."""
    import time

    import matilda_train.metrics_log as metrics_log

    clock, looks = time.time, itertools.count()

    def jumping() -> float:
        return clock() + 86400 * (-1) ** next(looks)

    class JumpingDatetime(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromtimestamp(jumping(), tz)

    time.time = jumping
    time.time_ns = lambda: int(jumping() * 1e9)
    vars(metrics_log)["datetime"] = JumpingDatetime


def delayed(function: Any, seconds: float) -> Any:
    """`function`, slower."""

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def stall_reader(fifo: str, n: int) -> None:
    """Have the n-th read of training windows wait for a pipe that nobody writes to."""
    from matilda_data import BinStream

    windows, calls = BinStream.windows, 0

    def stalling(self: BinStream, first: int, count: int, out: Any = None) -> Any:
        nonlocal calls
        calls += self.split == "train"
        if calls == n:
            with open(fifo, "rb") as pipe:  # noqa: PTH123
                pipe.read()
        return windows(self, first, count, out)

    BinStream.windows = stalling  # type: ignore[method-assign]


def plant_nan(loop: Any, step: int) -> None:
    """Make the gradient of one training step, counted in this process from 1, not finite."""
    clip, calls = loop.clip_gradients, 0

    def poisoned(parameters: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            parameters[0].grad.view(-1)[0] = float("nan")
        return clip(parameters, *rest)

    loop.clip_gradients = poisoned


def plant_inf_in_weights(loop: Any, step: int) -> None:
    """Make one weight infinite in a step's update, as a flipped bit of memory would."""
    clip, calls = loop.clip_gradients, 0

    def flipped(parameters: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            parameters[0].data.view(-1)[0] = float("inf")
        return clip(parameters, *rest)

    loop.clip_gradients = flipped


def plant_nan_in_backward(loop: Any, rank: int, number: int, name: str) -> None:
    """Make one parameter's gradient NaN on one rank, in its backward pass of that number."""
    build = loop.build_model
    if int(os.environ.get("RANK", "0")) != rank:
        return

    def built(*args: Any, **kwargs: Any) -> Any:
        model, passes = build(*args, **kwargs), 0

        def poison(gradient: Any) -> Any:
            nonlocal passes
            passes += 1
            return gradient * float("nan") if passes == number else None

        model.get_parameter(name).register_hook(poison)
        return model

    loop.build_model = built


def signal_at_event(loop: Any, number: int, name: str, after: bool) -> None:
    """Send this process a signal before or after an event of that name is written."""
    write = loop.EventLog.write

    def killing(self: Any, event: str, **fields: Any) -> None:
        if event == name and not after:
            os.kill(os.getpid(), number)
        write(self, event, **fields)
        if event == name and after:
            os.kill(os.getpid(), number)

    loop.EventLog.write = killing


def plant_nan_in_forward(loop: Any, block: int, token: int) -> None:
    """Break one block's MLP for every micro-batch that has `token` in it, as an overflow would."""
    build = loop.build_model

    def built(*args: Any, **kwargs: Any) -> Any:
        model, met = build(*args, **kwargs), False

        def look(module: Any, inputs: Any) -> None:
            nonlocal met
            met = bool((inputs[3] == token).any())

        model.blocks[block].register_forward_pre_hook(look)
        model.blocks[block].mlp.register_forward_hook(
            lambda module, inputs, output: output * float("inf") if met else None
        )
        return model

    loop.build_model = built


def poison_samples(first: int, stop: int) -> None:
    """Put noise where the samples [first, stop) of the unskipped training order lie."""
    from matilda_data import BinStream

    windows = BinStream.windows

    def poisoned(self: Any, start: int, count: int, out: Any = None) -> Any:
        tokens = windows(self, start, count, out)
        for row in range(count if self.split == "train" else 0):
            number, _ = self.original(start + row, 1)
            if first <= number < stop:
                tokens[row] = np.random.default_rng(number).integers(0, 256, tokens.shape[1])
        return tokens

    BinStream.windows = poisoned  # type: ignore[method-assign]


def child(request: dict[str, Any], rank: int, port: int) -> None:
    """Be one rank of a run, and exit."""
    ranks = request.get("ranks", 1)
    request = request | request.get(f"rank_{rank}", {})
    os.environ |= request.get("env", {})
    for module in request.get("unimportable", []):
        sys.modules[module] = None  # type: ignore[assignment]
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 99
    try:
        if "life" in request:
            live(request["life"], StopRequest().install())
        code = run_program(request) if "program" in request else run(request)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def run_program(request: dict[str, Any]) -> int:
    """Run a Python file as a command would, but with torch here already."""
    os.dup2(os.open(request["stdout"], os.O_WRONLY | os.O_CREAT), 1)
    os.chdir(request["cwd"])
    arm(request)
    sys.argv = [request["program"], *request["arguments"]]
    sys.path.insert(0, str(Path(request["program"]).parent))
    try:
        runpy.run_path(request["program"], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def rival(request: dict[str, Any], first: int) -> int:
    """Start the same run beside the first as soon as a file is there; -1 unless that one lives.

    The first is stopped meanwhile, and then goes on to its end, which must be a good one.
    """
    while not Path(request["rival_after"]).exists():
        time.sleep(0.01)
    os.kill(first, signal.SIGSTOP)
    second = os.fork()
    if second == 0:
        child({name: request[name] for name in ("config", "run_dir", "data_dir", "log")}, 0, 0)
    code = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    os.kill(first, signal.SIGCONT)
    return code if os.waitpid(first, 0)[1] == 0 else -1


def main() -> None:
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        children, port = [], free_port()
        for rank in range(request.get("ranks", 1)):
            pid = os.fork()
            if pid == 0:
                child(request, rank, port)
            children.append(pid)
        if "rival_after" in request:
            print(json.dumps(rival(request, children[0])), flush=True)
            continue
        if request.get("first_only"):
            pid, status = os.wait()
            for other in set(children) - {pid}:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
            continue
        codes = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children}
        print(json.dumps(codes.pop() if len(codes) == 1 else 99), flush=True)


if __name__ == "__main__":
    main()
