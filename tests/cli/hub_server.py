"""A small hub on this machine: the part of the Hugging Face hub's HTTP interface that downloads and uploads use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: `files[repository][path]` is a file's content; `served` lists the paths that were downloaded whole,
    `parts` how many bytes of which were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.served: list[str] = []
        self.parts: list[tuple[str, int]] = []
        self.gated: set[str] = set()

    @property
    def address(self) -> str:
        """The hub's address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Send a response."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: Any, status: int = 200) -> None:
        """Send a JSON response."""
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def body(self) -> bytes:
        """Read the request's content."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self) -> None:
        """Answer the look-up of a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer with a repository's list of files, or a file."""
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.files.get(repository)
        if files is None:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repository in self.server.gated:
            self.answer(
                403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}
            )
        elif parts[0] == "api" and "tree" in parts:
            self.answer_json(
                [
                    {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for p, d in files.items()
                ]
            )
        elif parts[0] == "api":
            self.answer_json(
                {
                    "id": repository,
                    "modelId": repository,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": p, "size": len(d)} for p, d in files.items()],
                }
            )
        else:
            self.send_file(files, "/".join(parts[4:]))

    def send_file(self, files: dict[str, bytes], path: str) -> None:
        """Send a file's content, whole or from where a download was cut off."""
        if path not in files:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = files[path]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is not None:
            begin, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else len(data), len(data))
            self.server.parts.append((path, end - begin))
            self.answer(206, data[begin:end], headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"})
            return
        if self.command == "GET":
            self.server.served.append(path)
        self.answer(200, data, headers)

    def do_PUT(self) -> None:
        """Store a large file's content."""
        data = self.body()
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self.answer(200)

    def do_POST(self) -> None:
        """Create a repository, say how files are to be sent, or commit them."""
        path, body = unquote(self.path.split("?")[0]), self.body()
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repository = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.server.files.setdefault(repository, {})
            self.server.private[repository] = bool(wanted.get("private", wanted.get("visibility") == "private"))
            self.answer_json({"url": f"{self.server.address}/{repository}"})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            self.answer_json({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            action = {"href": f"{self.server.address}/objects", "header": {}}
            self.answer_json(
                {
                    "transfer": "basic",
                    "objects": [o | {"authenticated": True, "actions": {"upload": action}} for o in objects],
                }
            )
        elif "/commit/" in path:
            self.commit(path, body)
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        else:
            self.answer(404)

    def commit(self, path: str, body: bytes) -> None:
        """Put the files of a commit into a repository."""
        repository = "/".join(path.split("/")[3:5])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[repository][value["path"]] = self.server.objects[value["oid"]]
        self.answer_json(
            {"commitUrl": f"{self.server.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        )


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
