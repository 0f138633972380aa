"""A small server that speaks enough of the Hugging Face hub's HTTP protocol for its own clients.

    python hub_server.py ROOT PORT

ROOT/<owner>/<name>/<files…> are dataset repositories of one commit each (`commit_of`). Faults are
read from ROOT/faults.json at every request: {"rate": 0.3, "kinds": ["500", "429", "garbage",
"truncate", "slow", "drop"]} makes that share of requests fail so, drawn from a fixed seed.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def commit_of(repository: Path) -> str:
    """A commit hash made of the repository's files."""
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(repository.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(repository).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    draw = random.Random(20)

    def log_message(self, format: str, *args: Any) -> None:
        with (self.root / "requests.log").open("a") as log:
            log.write(f"{self.command} {self.path} {args[1] if len(args) > 1 else ''}\n")

    def do_GET(self) -> None:
        self.answer(b"")

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def fault(self) -> str:
        try:
            value = json.loads((self.root / "faults.json").read_text())
        except (OSError, ValueError):
            return ""
        kinds = value.get("kinds", [])
        return self.draw.choice(kinds) if kinds and self.draw.random() < value["rate"] else ""

    def answer(self, body: bytes) -> None:
        fault = self.fault()
        if fault in ("500", "429"):
            self.send(int(fault), b'{"error": "injected"}', {"Retry-After": "0"})
        elif fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "garbage":
            self.send(200, b"<html>everything is fine</html>", {"ETag": '"0"'})
        else:
            if fault == "slow":
                time.sleep(0.3)
            self.truncate = fault == "truncate"
            self.route(body)

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if not headers or "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            cut = getattr(self, "truncate", False) and len(content) > 1
            self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.close_connection = True
                self.connection.close()

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def route(self, body: bytes) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        parts = path.strip("/").split("/")
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if parts[0] == "blobs" and len(parts) == 2:  # Software Heritage contents
            content = self.root / "blobs" / parts[1]
            return self.send(200, content.read_bytes()) if content.exists() else self.send(404, b"")
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            repository = self.root / parts[2] / parts[3]
            if not repository.is_dir():
                return self.missing("RepoNotFound")
            commit = commit_of(repository)
            rest = parts[4:]
            by_revision = rest[:1] in (["revision"], ["tree"], ["paths-info"]) and len(rest) > 1
            if by_revision and rest[1] not in ("main", commit):
                return self.missing("RevisionNotFound")
            if not rest or rest[0] == "revision":
                return self.json(self.info(repository, commit))
            if rest[0] == "tree":
                return self.tree(repository, "/".join(rest[2:]), query)
            if rest[0] == "paths-info":
                return self.paths_info(repository, body)
        if parts[0] == "datasets" and len(parts) > 5 and parts[3] == "resolve":
            return self.resolve(self.root / parts[1] / parts[2], parts[4], "/".join(parts[5:]))
        return self.missing("EntryNotFound")

    def missing(self, code: str) -> None:
        self.send(404, b'{"error": "not found"}', {"X-Error-Code": code})

    def info(self, repository: Path, commit: str) -> dict[str, Any]:
        files = [p.relative_to(repository).as_posix() for p in self.files(repository)]
        return {
            "id": f"{repository.parent.name}/{repository.name}",
            "author": repository.parent.name,
            "sha": commit,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name} for name in files],
        }

    def files(self, directory: Path) -> list[Path]:
        return sorted(path for path in directory.rglob("*") if path.is_file())

    def entry(self, repository: Path, path: Path) -> dict[str, Any]:
        name = path.relative_to(repository).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        raw = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()
        value: dict[str, Any] = {"type": "file", "oid": blob, "size": len(raw), "path": name}
        if path.suffix == ".parquet":
            sha256 = hashlib.sha256(raw).hexdigest()
            value["lfs"] = {"oid": sha256, "size": len(raw), "pointerSize": 130}
        return value

    def tree(self, repository: Path, below: str, query: dict[str, list[str]]) -> None:
        directory = repository / below
        if not directory.is_dir():
            return self.missing("EntryNotFound")
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        found = sorted(directory.rglob("*") if recursive else directory.iterdir())
        return self.json([self.entry(repository, path) for path in found])

    def paths_info(self, repository: Path, body: bytes) -> None:
        try:
            paths = json.loads(body)["paths"]
        except (ValueError, KeyError):
            paths = urllib.parse.parse_qs(body.decode()).get("paths", [])
        paths = [paths] if isinstance(paths, str) else paths
        found = [repository / path for path in paths if (repository / path).exists()]
        self.json([self.entry(repository, path) for path in found])

    def resolve(self, repository: Path, revision: str, name: str) -> None:
        if not repository.is_dir():
            return self.missing("RepoNotFound")
        commit = commit_of(repository)
        if revision not in ("main", commit):
            return self.missing("RevisionNotFound")
        path = repository / name
        if not path.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        entry = self.entry(repository, path)
        raw = path.read_bytes()
        headers = {
            "ETag": '"' + (entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]) + '"',
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(raw)),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if "lfs" in entry:
            headers["X-Linked-Etag"] = headers["ETag"]
        wanted = self.headers.get("Range")
        if wanted and self.command == "GET":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), (int(last) + 1 if last else len(raw))
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(raw)) - 1}/{len(raw)}"
            return self.send(206, raw[start:stop], headers)
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(raw))
        return self.send(200, raw, headers)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients hang up when a test says so


def main() -> None:
    Handler.root = Path(sys.argv[1])
    server = Server(("127.0.0.1", int(sys.argv[2])), Handler)
    (Handler.root / "port").write_text(str(server.server_port))
    server.serve_forever()


if __name__ == "__main__":
    main()
