"""A signal is a request; with a grace period it is also a deadline, wherever the process hangs."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from matilda_train.stop_signals import EXIT_PREEMPTED, STOP_SIGNALS, StopRequest

POLITE = """
import sys, time
from matilda_train.stop_signals import StopRequest
stop = StopRequest().install().begin().end_after(60)
print("ready", flush=True)
while not stop:
    time.sleep(0.01)
sys.exit(7)
"""
DEADLOCKED = """
import ctypes
from matilda_train.stop_signals import StopRequest
StopRequest().install().begin().end_after(0.2)
print("ready", flush=True)
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)  # for ever, and no Python handler runs meanwhile
"""


def ends_with(program: str, number: signal.Signals) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    code, said = ends_with(POLITE, number)
    assert code == 7
    assert f"{number.name}: saving at the next step" in said


@pytest.mark.parametrize(("before", "ends"), [("SIG_DFL", 7), ("SIG_IGN", -signal.SIGKILL)])
def test_a_terminal_that_is_gone_is_a_request_unless_that_is_ignored(
    before: str, ends: int
) -> None:
    program = f"import signal; signal.signal(signal.SIGHUP, signal.{before})\n{POLITE}"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    if before == "SIG_IGN":
        process.kill()  # it would go on for ever
    assert process.wait(timeout=60) == ends
    process.stdout.close()


def test_a_hanging_process_ends_after_its_grace_period() -> None:
    code, said = ends_with(DEADLOCKED, signal.SIGTERM)
    assert code == EXIT_PREEMPTED
    assert "Not done within 0.2 s; the newest checkpoint stands." in said


def test_a_grace_period_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="grace-seconds"):
        StopRequest().end_after(0)
