"""An export goes to the hub byte for byte, by the hub's own client; what fails is explained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_repository import TOKEN, HubRepositories

pytest.importorskip("huggingface_hub", reason="needs `matilda-train[hub]`: huggingface_hub")

UPLOAD = """
import sys
from matilda_train.app import run_app
from matilda_train.hub_upload import check_hub, upload_folder
def main():
    check_hub(sys.argv[2])
    print(upload_folder(sys.argv[1], sys.argv[2], private=True, message="run, step 7"))
    return 0
run_app(main)
"""


@pytest.fixture
def hub() -> Iterator[HubRepositories]:
    hub = HubRepositories()
    yield hub
    hub.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    made.mkdir()
    (made / "README.md").write_text("# A model\n")
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(os.urandom(300_000))
    return made


def upload(
    folder: Path, repository: str, url: str, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", UPLOAD, str(folder), repository],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        | {
            "HF_ENDPOINT": url,
            "HF_TOKEN": token,
            "HF_HOME": str(folder.parent / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        },
    )


def test_every_byte_arrives_in_one_commit(hub: HubRepositories, folder: Path) -> None:
    done = upload(folder, "me/hero", hub.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/me/hero/commit/{'1' * 40}\n"
    assert hub.files["me/hero"] == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert hub.private["me/hero"]
    assert [commit["summary"] for commit in hub.commits] == ["run, step 7"]


@pytest.mark.parametrize(
    ("repository", "token", "refuse", "code", "said"),
    [
        ("hero", TOKEN, {}, 2, "must be OWNER/NAME, not 'hero'"),
        ("me/hero", "", {}, 2, "run `hf auth login`, or set HF_TOKEN"),
        pytest.param(
            *("me/hero", "hf_other", {}, 2, "knows no such token"), marks=pytest.mark.slow
        ),
        ("me/hero", TOKEN, {"/commit/": 403}, 2, "may not write to 'me/hero'"),
        pytest.param(
            *("me/hero", TOKEN, {"/commit/": 500}, 4, "run the same command again"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_fails_is_one_sentence(
    hub: HubRepositories,
    folder: Path,
    repository: str,
    token: str,
    refuse: dict[str, int],
    code: int,
    said: str,
) -> None:
    hub.refuse = refuse
    done = upload(folder, repository, hub.url, token)
    assert done.returncode == code, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert said in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_no_network_is_one_sentence(folder: Path) -> None:
    done = upload(folder, "me/hero", "http://127.0.0.1:9")
    assert done.returncode == 4, done.stderr
    assert "The hub did not take 'me/hero'" in done.stderr
