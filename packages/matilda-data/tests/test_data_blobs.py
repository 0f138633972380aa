"""Texts fetched by git blob id: checked, asked for again, and absent ones left out."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import matilda_data.documents as documents_module
from matilda_data import DataError, Retry
from matilda_data.blobs import fetch_blobs
from matilda_data.documents import ReadOptions, read_documents
from matilda_data.inputs import find_files, plan_units

SERVER = Path(__file__).with_name("hub_server.py")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A store of contents, and its address."""
    root = tmp_path_factory.mktemp("store")
    (root / "blobs").mkdir()
    process = subprocess.Popen([sys.executable, str(SERVER), str(root), "0"])
    while not (root / "port").exists() or not (root / "port").read_text():
        time.sleep(0.02)
    port = (root / "port").read_text()
    yield root, f"http://127.0.0.1:{port}/blobs/{{blob_id}}"
    process.kill()
    process.wait()


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def put(root: Path, content: bytes) -> str:
    name = git_blob_id(content)
    (root / "blobs" / name).write_bytes(gzip.compress(content))
    return name


def test_contents_come_back_whatever_the_store_does(store: tuple[Path, str]) -> None:
    root, url = store
    texts = [f"print({i})\n" * i for i in range(1, 40)]
    ids = [put(root, text.encode()) for text in texts]
    retry = Retry(first_wait=0.01, longest_wait=0.02)
    assert fetch_blobs(url, ids, retry) == texts
    kinds = ["500", "429", "garbage", "truncate", "drop"]
    (root / "faults.json").write_text(json.dumps({"rate": 0.4, "kinds": kinds}))
    assert fetch_blobs(url, ids, retry) == texts
    (root / "faults.json").unlink()


def test_absent_and_undecodable_contents(store: tuple[Path, str]) -> None:
    root, url = store
    ids = ["0" * 40, put(root, "café".encode("latin-1"))]
    assert fetch_blobs(url, ids, Retry(first_wait=0.01)) == ["", "caf\ufffd"]


class Moody(ThreadingHTTPServer):
    """A store that answers each blob with `statuses` in turn before it sends the content."""

    request_queue_size = 64

    def __init__(self, contents: dict[str, bytes], statuses: list[int]) -> None:
        super().__init__(("127.0.0.1", 0), MoodyHandler)
        self.contents, self.statuses = contents, statuses
        self.asked: collections.Counter[str] = collections.Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{{blob_id}}"

    def __enter__(self) -> Moody:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class MoodyHandler(BaseHTTPRequestHandler):
    server: Moody

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.strip("/")
        content = self.server.contents.get(name)
        turn = self.server.asked[name]
        self.server.asked[name] += 1
        late = turn >= len(self.server.statuses)
        absent = 404 if content is None else 200
        status = absent if late else self.server.statuses[turn]
        self.send_response(status)
        self.end_headers()
        if status == 200 and content is not None:
            self.wfile.write(content)


@pytest.mark.parametrize("statuses", [[403], [404, 404], [404, 403, 500, 404, 404]])
def test_a_store_that_says_not_there_in_passing_loses_no_document(statuses: list[int]) -> None:
    contents = {git_blob_id(text): text for text in (b"one", b"two", b"three", b"four")}
    with Moody(contents, statuses) as server:
        texts = fetch_blobs(server.url, list(contents), Retry(first_wait=0.01))
    assert texts == [text.decode() for text in contents.values()]
    assert set(server.asked.values()) == {len(statuses) + 1}


def test_not_there_is_believed_the_third_time_in_a_row() -> None:
    here = git_blob_id(b"here")
    with Moody({here: b"here"}, []) as server:
        assert fetch_blobs(server.url, ["0" * 40, here], Retry(first_wait=0.01)) == ["", "here"]
    assert server.asked == {"0" * 40: 3, here: 1}


def test_not_there_is_not_believed_because_time_is_up() -> None:
    with (
        Moody({}, []) as server,
        pytest.raises(DataError, match=r"failed \(_NotThereError: HTTP status 404\)"),
    ):
        fetch_blobs(server.url, ["0" * 40], Retry(first_wait=0.05, give_up_after=0.01))
    assert server.asked == {"0" * 40: 1}


def test_rows_without_a_text_in_the_store_are_told_once_a_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    here = git_blob_id(b"here")
    rows = [{"blob_id": here}] * 300 + [{"blob_id": f"{n:040x}"} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "code.parquet")
    # Units wait as long as the defaults say.
    monkeypatch.setattr(documents_module, "Retry", lambda: Retry(first_wait=0.01))
    (unit,) = plan_units(find_files([tmp_path / "code.parquet"], exclude=(), include=None))
    with Moody({here: b"here"}, []) as server:
        unit = dataclasses.replace(unit, blob_url=server.url)
        texts = [document.text for document in read_documents(unit, ReadOptions())]
    assert texts == ["here"] * 300 + [""] * 3
    (message,) = caplog.messages
    assert message.startswith("3 rows of code.parquet have no text at http://127.0.0.1:")


def test_giving_up_is_one_sentence(store: tuple[Path, str]) -> None:
    root, url = store
    name = put(root, b"text")
    (root / "blobs" / name).write_bytes(b"another text")
    retry = Retry(first_wait=0.01, give_up_after=0.05)
    with pytest.raises(DataError, match=r"fetching .* failed \(DataError: the content at"):
        fetch_blobs(url, [name], retry)


@pytest.mark.timeout(60)
def test_ctrl_c_ends_the_waiting_for_a_store_that_is_down() -> None:
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/{{blob_id}}"
        main = threading.main_thread().ident
        assert main is not None

        ended = threading.Event()

        def press_while_it_waits_for_an_answer() -> None:
            pause = 0.01
            while not ended.wait(pause):
                caller = sys._current_frames()[main].f_back
                if caller is not None and caller.f_code.co_name == "result":
                    # again after a second: a key just before a lock is taken is lost to Python
                    os.kill(os.getpid(), signal.SIGINT)
                    pause = 1.0

        threading.Thread(target=press_while_it_waits_for_an_answer, daemon=True).start()
        # a shell's background job begins with the key ignored
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                fetch_blobs(url, ["0" * 40] * 100, Retry(first_wait=10**6, longest_wait=10**6))
        finally:
            ended.set()
            signal.signal(signal.SIGINT, before)


def test_a_download_under_way_does_not_keep_a_process_that_ends(tmp_path: Path) -> None:
    code = f"""
import threading
from pathlib import Path
import matilda_data.hub_client as client
began = threading.Event()
client._download_checked = lambda *_: began.set() or threading.Event().wait()
files = client.HubFiles(Path({str(tmp_path)!r}), None, client.Retry(), None)
file = client.HubFile(path="a.parquet", size=1, sha256="0" * 64, blob_id="")
files.look_ahead(client.HubSource(name="a", dataset="org/a"), "main", file)
began.wait()
files.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
