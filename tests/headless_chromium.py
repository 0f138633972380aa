"""A headless Chromium, spoken to over a pipe by the DevTools protocol; no network, no driver."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell", "chrome")
SECONDS = 120.0


def find_chromium() -> str | None:
    """The browser at $CHROMIUM, or the first of the usual names on PATH."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page in a browser of its own; what it logs and asks of any network is written down."""

    def __init__(self, program: str, profile: Path, *, offline: bool = True) -> None:
        self.errors: list[str] = []
        """Uncaught exceptions and what was written to the console as an error."""
        self.requests: list[str] = []
        """Every address that the page asked for."""
        self._events: list[dict[str, Any]] = []
        self._buffer = b""
        self._number = 0
        commands, self._write = os.pipe()
        self._read, replies = os.pipe()
        # Numbers that 3 and 4, where the protocol has its pipe, cannot overwrite.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, replies)]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", LAUNCH, *map(str, ends), program, *OPTIONS),
                *(f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, replies, *ends):
            os.close(end)
        self._session = ""
        # One of its own: what the browser lists first may be a part of its window.
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        if offline:
            self.ask(
                "Network.emulateNetworkConditions",
                offline=True,
                latency=0,
                downloadThroughput=-1,
                uploadThroughput=-1,
            )

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._read)
        os.close(self._write)

    def open(self, at: Path | str, *, width: int = 1400, height: int = 900, scheme: str) -> None:
        """Load a file or an address and wait until its script has set `data-ready`."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.set_scheme(scheme)
        self.ask("Page.navigate", url=at if isinstance(at, str) else at.resolve().as_uri())
        self.wait_until("document.documentElement?.dataset.ready === 'true'")

    def wait_until(self, condition: str, *, expected_error: str | None = None) -> None:
        """Wait until a JavaScript expression is true; errors but the expected ones fail."""
        deadline = time.monotonic() + SECONDS
        while not self.evaluate(condition):
            unexpected = [e for e in self.errors if not expected_error or expected_error not in e]
            assert not unexpected, unexpected
            assert time.monotonic() < deadline, f"it never became true that {condition}"
            time.sleep(0.05)

    def set_scheme(self, scheme: str) -> None:
        """Prefer "light" or "dark" from now on."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.ask("Emulation.setEmulatedMedia", features=[feature])

    def evaluate(self, expression: str) -> Any:
        """A JavaScript expression's value, promises awaited."""
        answer = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, out: Path, *, whole: bool = True) -> None:
        """Save a PNG of the whole page, or of what the window shows."""
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        out.write_bytes(base64.b64decode(data["data"]))

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command; returns its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                result: dict[str, Any] = reply["result"]
                return result
            self._note(reply.get("method", ""), reply.get("params", {}))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser ended"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:600])
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(json.dumps(params["args"])[:600])
        if method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])


LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execvp(sys.argv[3], sys.argv[3:])"
)
OPTIONS = [
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--proxy-server=127.0.0.1:9",
]
