"""The HTTP side: one page, one model card, one stream of tokens.

GET /           the page
GET /model      what is served: step, losses, parameters, tokenizer
POST /complete  a `CompletionRequest` as JSON; answered by server-sent events: `queued` while others
                are served, `token`s, and one `end` or `error`

Whoever closes the connection ends the work. Anything wrong is `{"error": "one sentence"}`.
"""

from __future__ import annotations

import ipaddress
import json
import math
import select
import socket
import sys
from collections.abc import Collection, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from matilda_data import Tokenizer
from matilda_model import Transformer, count_params
from matilda_train.hardware import device_name
from matilda_train.metrics_log import read_rows
from matilda_train.serve.completion import CompletionRequest, complete
from matilda_train.serve.turnstile import BusyError, Turnstile
from matilda_train.trained_model import load_trained

__all__ = ["CompletionServer", "open_server"]

MOST_BODY_BYTES = 1 << 18
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
}


def open_server(
    run_dir: str | Path,
    *,
    step: int | None = None,
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    names: Collection[str] = (),
) -> CompletionServer:
    """A server of a run's newest healthy checkpoint, or of the one at `step`, not serving yet.

    Port 0 takes a free one. `names` are host names by which it may be asked besides `localhost` and
    addresses. Raises `ValueError` when the directory holds no run or no checkpoint yet,
    and when that address cannot be had, `CheckpointError` when none is valid.
    """
    trained = load_trained(run_dir, step=step, device=device)
    config, model = trained.config, trained.model
    rows = read_rows(Path(run_dir) / "metrics.jsonl")
    rows = [row for row in rows if _step(row) <= trained.step]
    card = {
        "run": Path(run_dir).resolve().name,
        "step": trained.step,
        "tokens": config.plan.tokens(trained.step),
        "parameters": count_params(config.model),
        "tokenizer": config.data.tokenizer,
        "longest_sequence": config.model.max_seq_len,
        "device": device_name(model.embed.weight.device),
        **{
            name: next((row[name] for row in reversed(rows) if name in row), None)
            for name in ("loss_nats", "val_loss_nats", "val_bits_per_byte")
        },
    }
    try:
        return CompletionServer(model, trained.tokenizer, card, (host, port), names)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"Nobody can be served at '{host}:{port}' ({getattr(error, 'strerror', None) or error})"
            "; choose another `--port`, 0 for a free one, or another `--host`."
        ) from None


def _step(row: Mapping[str, Any]) -> float:
    step = row.get("step")
    return step if isinstance(step, int) else math.inf


class CompletionServer(ThreadingHTTPServer):
    """Serves one model to one client at a time; others wait in line."""

    daemon_threads = True

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        card: dict[str, Any],
        address: tuple[str, int],
        names: Collection[str] = (),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.card = card
        self.page = resources.files(__package__).joinpath("page.html").read_bytes()
        self.turnstile = Turnstile()
        self._names = {"localhost", *(name.lower() for name in names)}
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if ipaddress.ip_address(host).is_unspecified:
            host = "localhost"
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    @property
    def is_open_to_others(self) -> bool:
        """Whether it listens to more than this machine."""
        return not ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def knows(self, host: str) -> bool:
        """Whether a request may be for `host`: a foreign name that resolves here is an attack."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
            return name in self._names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients may go whenever they like
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: CompletionServer
    protocol_version = "HTTP/1.1"
    server_version = "matilda"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        if not self._is_welcome():
            return
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif path == "/model":
            self._send_json(HTTPStatus.OK, self.server.card)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"There is nothing at {path!r}; the page is at `/`.")

    def do_HEAD(self) -> None:
        self.do_GET()  # `_send` leaves the content out

    def do_POST(self) -> None:
        if not self._is_welcome():
            return
        if self.path.partition("?")[0] != "/complete":
            self._refuse(HTTPStatus.NOT_FOUND, "Only `/complete` takes a POST.")
            return
        try:
            request = CompletionRequest.from_json(self._body())
            events = complete(self.server.model, self.server.tokenizer, request)
            self._stream(events)
        except ValueError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except BusyError:
            self._refuse(
                HTTPStatus.SERVICE_UNAVAILABLE, "Too many requests wait already; try again."
            )

    def _stream(self, events: Any) -> None:
        self._streaming = False
        with self.server.turnstile.turn(self._tell_queued) as came:
            try:
                for event in events if came else ():
                    if self._client_left():
                        return
                    self._tell(event)
            except ValueError as error:
                if not self._streaming:
                    raise
                self._tell({"event": "error", "message": str(error)})
            except RuntimeError as error:  # torch's: out of memory, a kernel that failed
                what = str(error).partition("\n")[0]
                sentence = f"The model failed ({what}); the server's terminal says more."
                if self._streaming:
                    self._tell({"event": "error", "message": sentence})
                else:
                    self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, sentence)
                raise

    def _tell_queued(self, ahead: int) -> bool:
        if self._client_left():
            return False
        self._tell({"event": "queued", "ahead": ahead})
        return True

    def _tell(self, event: dict[str, Any]) -> None:
        if not self._streaming:
            self._streaming = True
            self._head(HTTPStatus.OK, "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _client_left(self) -> bool:
        """Whether the other side has closed its connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _body(self) -> object:
        """The decoded JSON of the request; `ValueError` for anything else."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ValueError("The `Content-Type` must be `application/json`.")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise ValueError("The request needs a `Content-Length`.")
        if int(length) > MOST_BODY_BYTES:
            raise ValueError(f"The body has {length} bytes; at most {MOST_BODY_BYTES} are taken.")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"The body is not JSON: {error}.") from None

    def _is_welcome(self) -> bool:
        """Whether host and origin are this server's own; refuses the request otherwise."""
        host = self.headers.get("Host", "")
        if not self.server.knows(host):
            self._refuse(
                HTTPStatus.FORBIDDEN,
                f"This server is not known as {host[:100]!r}; start it with `--allow-host` for it.",
            )
            return False
        origin = self.headers.get("Origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            self._refuse(HTTPStatus.FORBIDDEN, "Pages of other sites may not ask this server.")
            return False
        return True

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        self.close_connection = True  # what is left of the request is not read
        self._send_json(status, {"error": sentence})

    def _send_json(self, status: HTTPStatus, value: object) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self._head(status, kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: HTTPStatus, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in HEADERS.items():
            self.send_header(name, value)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself, in this server's form."""
        status = HTTPStatus(code)
        self._refuse(status, f"{message or status.phrase}.")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal belongs to the address of the page."""
