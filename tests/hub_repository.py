"""A hub of one machine that takes uploads: repositories, LFS objects and commits, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"


class HubRepositories:
    """Speaks what huggingface_hub's client asks of the hub to create a repository and fill it."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        """Contents by repository and path."""
        self.private: dict[str, bool] = {}
        self.commits: list[dict[str, Any]] = []
        self.refuse: dict[str, int] = {}
        """Status codes to answer with, by a part of the path."""
        self._objects: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = request.path.partition("?")[0]
        status, value = self._handle(request.command, path, body, request.headers)
        content = json.dumps(value).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def _handle(self, method: str, path: str, body: bytes, headers: Any) -> tuple[int, Any]:
        for part, status in self.refuse.items():
            if part in path:
                return status, {"error": "refused"}
        if method == "PUT" and path.startswith("/objects/"):
            self._objects[hashlib.sha256(body).hexdigest()] = body
            return 200, {}
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid token"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.files.setdefault(name, {})
            private = asked.get("private") or asked.get("visibility") == "private"
            self.private.setdefault(name, bool(private))
            return 200, {"url": f"{self.url}/{name}", "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if re.fullmatch(r"/api/models/[\w-]+/[\w.-]+/preupload/main", path):
            asked = json.loads(body)["files"]
            return 200, {"files": [{**mode(file), "shouldIgnore": False} for file in asked]}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**thing, "actions": {"upload": {"href": f"{self.url}/objects/{thing['oid']}"}}}
                for thing in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if match := re.fullmatch(r"/api/models/([\w-]+/[\w.-]+)/commit/main", path):
            return 200, self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        if re.fullmatch(r"/api/models/[\w-]+/[\w.-]+(/revision/main)?", path):
            return 200, {"id": "me/x", "sha": "0" * 40, "siblings": [], "private": True}
        return 404, {"error": f"nothing at {path}"}

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value)
            if line["key"] == "file":
                self.files[repository][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.files[repository][value["path"]] = self._objects[value["oid"]]
        commit = "1" * 40
        url = f"{self.url}/{repository}/commit/{commit}"
        return {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}


def mode(file: dict[str, Any]) -> dict[str, Any]:
    """Weights go by LFS, text as it is."""
    kind = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": kind}
