"""Texts fetched by git blob id: checked, asked for again, and absent ones left out."""

from __future__ import annotations

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
from pathlib import Path

import pytest

from matilda_data import DataError, Retry
from matilda_data.blobs import fetch_blobs

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


def put(root: Path, content: bytes) -> str:
    name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
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
    assert fetch_blobs(url, ids, Retry()) == ["", "caf\ufffd"]


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
