"""The page that talks to a checkpoint: what its server answers and refuses, and a browser on it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from headless_chromium import Page, find_chromium
from matilda_data import load_tokenizer
from matilda_model import Choice, ModelConfig, Transformer
from matilda_train import complete_text, load_run_model
from matilda_train.serve import BusyError, CompletionRequest, CompletionServer, open_server
from matilda_train.serve.server import MOST_BODY_BYTES

CHROMIUM = find_chromium()


@contextmanager
def serving(server: CompletionServer) -> Iterator[CompletionServer]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def served(twin: Path) -> Iterator[CompletionServer]:
    with serving(open_server(twin, device="cpu", port=0)) as server:
        yield server


@pytest.fixture
def long_winded() -> Iterator[CompletionServer]:
    """An untrained model that could go on for 4,000 tokens."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=320, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=4096
    )
    model, tokenizer = Transformer(config).eval(), load_tokenizer("byte")
    with serving(CompletionServer(model, tokenizer, {}, ("127.0.0.1", 0))) as server:
        yield server


class Client:
    """One request over one connection."""

    def __init__(
        self,
        server: CompletionServer,
        method: str,
        path: str,
        body: object = None,
        **headers: str,
    ) -> None:
        host, port = server.server_address[:2]
        self.connection = http.client.HTTPConnection(str(host), port, timeout=60)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        self.connection.request(method, path, content, named)
        self.answer = self.connection.getresponse()

    def leave(self) -> None:
        self.answer.close()
        self.connection.close()

    def whole(self) -> bytes:
        """The rest of the answer, read before the connection ends."""
        try:
            return self.answer.read()
        finally:
            self.leave()

    def status(self) -> int:
        self.whole()
        return self.answer.status

    def json(self) -> Any:
        return json.loads(self.whole())

    def next_event(self) -> dict[str, Any]:
        line = self.answer.readline()
        assert line.startswith(b"data: "), line
        assert self.answer.readline() == b"\n"
        event: dict[str, Any] = json.loads(line[len(b"data: ") :])
        return event

    def events(self) -> list[dict[str, Any]]:
        lines = self.whole().decode().split("\n\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def test_the_stream_is_generates_text_with_probabilities(
    served: CompletionServer, twin: Path
) -> None:
    body = {"prompt": "the he", "max_tokens": 12, "seed": 3, "temperature": 1.1, "top_k": None}
    *tokens, end = Client(served, "POST", "/complete", body).events()
    model, tokenizer = load_run_model(twin, device="cpu")
    whole = complete_text(
        model, tokenizer, "the he", max_new_tokens=12, seed=3, temperature=1.1, top_k=None
    )
    assert "the he" + "".join(t["text"] for t in tokens) + end["text"] == whole
    assert end["event"] == "end"
    assert end["tokens"] == len(tokens)
    for token in tokens:
        shares = [share for _, share in token["candidates"]]
        assert len(shares) == 10
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1 + 1e-6
        assert token["probability"] <= shares[0]


def test_ends_are_explained(served: CompletionServer) -> None:
    def reason(**body: object) -> tuple[str, str]:
        body = {"temperature": 0, "prompt": "the heart runs "} | body
        *tokens, end = Client(served, "POST", "/complete", body).events()
        return end["reason"], "".join(token["text"] for token in tokens)

    assert reason(max_tokens=3)[0] == "length"
    kind, text = reason(max_tokens=500)
    assert kind in ("room", "end of text")
    stop = text[1:3]
    assert reason(max_tokens=500, stop=[stop]) == ("stop", text[: text.index(stop) + 2])


def test_model_card_and_page(served: CompletionServer, twin: Path) -> None:
    card = Client(served, "GET", "/model").json()
    assert card["step"] == 12
    assert card["parameters"] == sum(p.numel() for p in served.model.parameters())
    assert card["val_loss_nats"] > 0
    page = Client(served, "GET", "/")
    assert page.answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in page.answer.headers["Content-Security-Policy"]
    assert b"://" not in page.whole()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"promt": "x"}, "did you mean `prompt`?"),
        ({"prompt": 3}, "`prompt` must be a text."),
        ({"max_tokens": 0}, "`max_tokens` must be 1 or more."),
        ({"max_tokens": True}, "`max_tokens` must be 1 or more."),
        ({"temperature": -1}, "`temperature` must be between 0 and 100."),
        ({"temperature": "hot"}, "`temperature` must be between 0 and 100."),
        (b'{"temperature": NaN}', "`temperature` must be between 0 and 100."),
        ({"top_k": 0}, "`top_k` must be 1 or more, or null."),
        ({"top_p": 1.5}, "`top_p` must be above 0 and at most 1, or null."),
        ({"seed": -1}, "`seed` must be from 0"),
        ({"stop": "x"}, "`stop` must be a list"),
        ({"stop": [""]}, "`stop` must be a list"),
        ({"prompt": "x" * 40}, "longest sequence is 32"),
        ({"prompt": "\ud800"}, "surrogate"),
        ([], "must be a JSON object"),
        (b"{", "The body is not JSON"),
        (b"[" * 100_000, "The body is not JSON"),
        (b"\xff", "The body is not JSON"),
        (b"x" * (MOST_BODY_BYTES + 1), "at most"),
    ],
)
def test_a_bad_request_is_answered_in_one_sentence(
    served: CompletionServer, body: object, sentence: str
) -> None:
    client = Client(served, "POST", "/complete", body)
    assert client.answer.status == 400
    said = client.json()
    assert set(said) == {"error"}
    assert sentence in said["error"]
    assert "\n" not in said["error"]


def test_other_methods_paths_and_kinds_are_refused(served: CompletionServer) -> None:
    assert Client(served, "GET", "/etc/passwd").status() == 404
    assert Client(served, "POST", "/", {}).status() == 404
    assert Client(served, "DELETE", "/").status() == 501
    assert Client(served, "POST", "/complete", b"{}", Content_Type="text/plain").status() == 400


def test_head_is_get_without_its_content(served: CompletionServer) -> None:
    asked = Client(served, "HEAD", "/")
    assert asked.answer.status == 200
    assert int(asked.answer.headers["Content-Length"]) == len(served.page)
    assert asked.whole() == b""
    assert Client(served, "HEAD", "/etc/passwd").status() == 404


@pytest.mark.parametrize(("host", "open_to_others"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_who_may_reach_it_is_known(
    long_winded: CompletionServer, host: str, open_to_others: bool
) -> None:
    model, tokenizer = long_winded.model, long_winded.tokenizer
    with CompletionServer(model, tokenizer, {}, (host, 0)) as server:
        assert server.is_open_to_others is open_to_others


def test_foreign_names_and_pages_are_refused(served: CompletionServer) -> None:
    def status(**headers: str) -> int:
        return Client(served, "GET", "/model", **headers).status()

    port = served.server_address[1]
    assert status(Host="evil.example") == 403
    assert status(Host=f"evil.example:{port}") == 403
    assert status(Host="127.0.0.1.evil.example") == 403
    assert status(Host="") == 403
    assert status(Host=f"localhost:{port}") == 200
    assert status(Host=f"[::1]:{port}") == 200
    assert status(Host=f"localhost:{port}", Origin=f"http://localhost:{port}") == 200
    assert status(Host=f"localhost:{port}", Origin="https://evil.example") == 403
    assert status(Host=f"localhost:{port}", Origin="null") == 403
    assert status(Host=f"localhost:{port}", Origin="http://[") == 403


def test_a_client_that_leaves_ends_its_completion(long_winded: CompletionServer) -> None:
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    long_winded.model.register_forward_hook(count)
    first = Client(long_winded, "POST", "/complete", {"max_tokens": 4000, "top_k": 5})
    assert first.next_event()["event"] == "token"
    first.leave()
    second = Client(long_winded, "POST", "/complete", {"max_tokens": 3})
    assert [e["event"] for e in second.events() if e["event"] != "queued"][-1] == "end"
    assert passes < 3000


def test_requests_wait_in_line_and_may_leave_it(long_winded: CompletionServer) -> None:
    line = long_winded.turnstile
    with line.turn(lambda ahead: True) as came:
        assert came
        clients = [Client(long_winded, "POST", "/complete", {"max_tokens": 2}) for _ in range(2)]
        assert [client.next_event() for client in clients] == [
            {"event": "queued", "ahead": 1},
            {"event": "queued", "ahead": 2},
        ]
        clients[0].leave()
        while clients[1].next_event() != {"event": "queued", "ahead": 1}:
            pass
    assert clients[1].events()[-1]["event"] == "end"


def test_a_model_that_fails_is_told_to_the_client(
    long_winded: CompletionServer, capfd: pytest.CaptureFixture[str]
) -> None:
    passes = 0

    def fail(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes in (1, 4):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    long_winded.model.register_forward_hook(fail)
    sentence = "The model failed (CUDA out of memory.); the server's terminal says more."
    at_once = Client(long_winded, "POST", "/complete", {"max_tokens": 9})
    assert at_once.answer.status == 500
    assert at_once.json() == {"error": sentence}
    *_, last = Client(long_winded, "POST", "/complete", {"max_tokens": 9}).events()
    assert last == {"event": "error", "message": sentence}
    told = ""
    while told.count("torch.OutOfMemoryError: CUDA") < 2:  # in the terminal, with the rest of it
        told += capfd.readouterr().err
        time.sleep(0.01)
    assert Client(long_winded, "POST", "/complete", {"max_tokens": 2}).events()[-1]["tokens"] == 2


def test_a_character_of_several_tokens_is_partial_until_its_last(
    long_winded: CompletionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spell(*_: object, **__: object) -> Iterator[Choice]:
        yield from (Choice(byte, 1.0, ((byte, 1.0),)) for byte in b"a" + "🎉".encode() + b"b")

    monkeypatch.setattr("matilda_train.serve.completion.stream_choices", spell)
    *tokens, _ = Client(long_winded, "POST", "/complete", {"max_tokens": 6}).events()
    assert [token["text"] for token in tokens] == ["a", "", "", "", "🎉", "b"]
    assert [token["partial"] for token in tokens] == [False, True, True, True, False, False]


def test_a_full_line_sends_away(long_winded: CompletionServer) -> None:
    line = long_winded.turnstile
    line._most_waiting = 0
    with line.turn(lambda ahead: True):
        client = Client(long_winded, "POST", "/complete", {"max_tokens": 2})
        assert client.answer.status == 503
        assert "error" in client.json()
        with pytest.raises(BusyError), line.turn(lambda ahead: True):
            pass


def test_defaults_of_a_request_are_generates_own() -> None:
    assert CompletionRequest.from_json({}) == CompletionRequest(max_tokens=200, top_k=50)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium at $CHROMIUM or on PATH")
def test_the_page_writes_shows_probabilities_and_stops(
    served: CompletionServer, tmp_path: Path
) -> None:
    assert CHROMIUM is not None
    with Page(CHROMIUM, tmp_path, offline=False) as page:
        page.open(served.url, width=1180, height=620, scheme="light")
        assert "step 12" in page.evaluate("document.getElementById('model').innerText")
        page.evaluate("document.getElementById('prompt').value = 'the heart '")
        page.evaluate("document.getElementById('max_tokens').value = 15")
        page.evaluate("document.getElementById('go').click()")
        page.wait_until("/15 tokens in/.test(document.getElementById('state').innerText)")
        text = page.evaluate("document.getElementById('text').innerText")
        assert text.startswith("the heart ")
        assert page.evaluate("document.querySelectorAll('#text .token').length") == 15
        page.evaluate("document.querySelectorAll('#text .token')[4].click()")
        assert page.evaluate("document.querySelectorAll('#bars li').length") == 10
        assert "Token 5" in page.evaluate("document.getElementById('place').innerText")
        shares = page.evaluate(
            "[...document.querySelectorAll('#bars .share')].map(s => parseFloat(s.innerText))"
        )
        assert shares == sorted(shares, reverse=True)
        # going on with another token
        other = "document.querySelector('#bars button:not(.drawn):not(:disabled)').click()"
        page.evaluate(other)
        page.wait_until("/tokens in/.test(document.getElementById('state').innerText)")
        prompt = page.evaluate("document.querySelector('#text .prompt').innerText")
        assert len(prompt) == len("the heart ") + 5
        # a mistake is said in the page
        page.evaluate("document.getElementById('temperature').value = -1")
        page.evaluate("document.getElementById('go').click()")
        page.wait_until(
            "document.getElementById('state').className === 'bad'", expected_error="400"
        )
        assert "`temperature`" in page.evaluate("document.getElementById('state').innerText")
        bad = [error for error in page.errors if "400" not in error]
        assert bad == []
        assert all(url.startswith((served.url, "data:")) for url in page.requests)


def press(page: Page, key: str) -> None:
    codes = {"Enter": 13, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "End": 35}
    named = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
    text = {"text": "\r"} if key == "Enter" else {}
    page.ask("Input.dispatchKeyEvent", type="keyDown", **named, **text)
    page.ask("Input.dispatchKeyEvent", type="keyUp", **named)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium at $CHROMIUM or on PATH")
def test_the_page_by_keyboard_and_by_ear(served: CompletionServer, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    focused = "document.activeElement.id || document.activeElement.textContent"
    place = "document.getElementById('place').textContent"
    with Page(CHROMIUM, tmp_path, offline=False) as page:
        page.open(served.url, width=390, height=800, scheme="light")
        page.evaluate(
            """
            window.said = [];
            for (const id of ['state', 'told']) new MutationObserver(changes => {
              const live = document.getElementById(id);
              if (live.ariaLive !== 'off') said.push(live.textContent);
            }).observe(document.getElementById(id), {childList: true, subtree: true});
            document.getElementById('prompt').value = 'the heart ';
            document.getElementById('max_tokens').value = 12;
            document.getElementById('temperature').value = 0;
            document.getElementById('go').focus();
            """
        )
        press(page, "Enter")
        page.wait_until("running === null && tokens.length > 2")
        assert page.evaluate(focused) == "go"
        count = page.evaluate("tokens.length")
        said = page.evaluate("said.filter(Boolean)")
        assert len(said) <= 3, said  # that it began, perhaps that it waits, and how it ended
        assert f"{count} tokens in" in said[-1]
        press(page, "Tab")  # Stop is disabled; all tokens are one stop of the Tab key
        assert page.evaluate(place).startswith("Token 1:")
        press(page, "ArrowRight")
        assert page.evaluate(place).startswith("Token 2:")
        press(page, "End")
        assert page.evaluate(place).startswith(f"Token {count}:")
        press(page, "ArrowRight")
        press(page, "ArrowLeft")
        assert page.evaluate(place).startswith(f"Token {count - 1}:")
        assert f"Token {count - 1}:" in page.evaluate("said.at(-1)")
        press(page, "Tab")
        bars = "document.getElementById('bars')"
        assert page.evaluate(f"{bars}.contains(document.activeElement)")
        press(page, "Enter")
        page.wait_until("running === null && start !== 'the heart '")
        assert page.evaluate(focused) == "go"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.errors == []
