"""Trying again: back-off, giving up, final errors, stopping; and the progress line."""

from __future__ import annotations

import io
import threading

import pytest

from matilda_data import DataError, Progress, ProgressLine, Retry


class Flaky:
    """Fails `times` times with `error`, then returns 7."""

    def __init__(self, times: int, error: Exception) -> None:
        self.calls, self.times, self.error = 0, times, error

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return 7


def test_errors_are_waited_out_with_doubling_waits() -> None:
    flaky, notes = Flaky(4, OSError("down\nand out")), []
    retry = Retry(first_wait=0.001, longest_wait=0.003)
    assert retry.call(flaky, "asking", note=notes.append) == 7
    assert flaky.calls == 5
    waits = [note.removeprefix("asking: OSError: down; trying again in ") for note in notes]
    assert waits == ["0.001 s", "0.002 s", "0.003 s", "0.003 s"]


def test_final_error_is_believed_the_third_time_in_a_row() -> None:
    retry = Retry(first_wait=0.001)
    assert retry.call(Flaky(2, KeyError("gone")), "asking", final=(KeyError,)) == 7
    with pytest.raises(DataError, match=r"asking failed \(KeyError: 'gone'\)"):
        retry.call(Flaky(3, KeyError("gone")), "asking", final=(KeyError,))


def test_giving_up_and_stopping_end_the_waiting() -> None:
    with pytest.raises(DataError, match="failed"):
        Retry(first_wait=0.01, give_up_after=0.02).call(Flaky(10**9, OSError()), "asking")
    stopping = threading.Event()
    threading.Timer(0.05, stopping.set).start()
    with pytest.raises(DataError, match="failed"):
        Retry(first_wait=10**6, longest_wait=10**6).call(
            Flaky(10**9, OSError()), "asking", stopping=stopping
        )


def test_progress_line_has_speed_share_sources_and_notes() -> None:
    out = io.StringIO()
    line = ProgressLine(out, interval=0)
    base = {"documents": 3, "bytes_done": 0, "bytes_total": 100}
    line(Progress(stage="encode", tokens=0, **base))
    line(
        Progress(
            stage="encode",
            tokens=2_000_000,
            source_tokens={"web": 1_500_000, "code": 500_000},
            target_tokens=8_000_000,
            **base,
        )
    )
    line(Progress(stage="download", tokens=2_000_000, note="hub: down", **base))
    line(Progress(stage="done", tokens=8_000_000, **base))
    rows = out.getvalue().splitlines()
    line(Progress(stage="pack", tokens=8_000_000, **base))
    assert "%" not in out.getvalue().splitlines()[-1], "how far packing is nobody knows"
    assert len(rows) == 4
    assert "25.0 %" in rows[1]
    assert "tokens/s" in rows[1]
    assert "ETA 0:00:" in rows[1]
    assert "(web 1.50M, code 500,000)" in rows[1]
    assert rows[2].endswith("hub: down")
