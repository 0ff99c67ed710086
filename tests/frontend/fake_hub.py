"""A server that speaks as much of the Hugging Face hub's API as a download needs, and fails as it is told."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MISSING = {"owner/missing": (401, "RepoNotFound"), "owner/gated": (403, "GatedRepo")}


class FakeHub(ThreadingHTTPServer):
    """`files` by repository and name. `fetched` are the files that were asked for; after `cut` bytes of one the
    connection ends, once, and before each block of one there is a pause of `pause_s`."""

    daemon_threads = True

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.fetched: list[str] = []
        self.ranges: list[str] = []
        self.cut = 0
        self.pause_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def fake_hub(files: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    server = FakeHub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository, (kind, revision) = "/".join(parts[:2]), parts[2:4] or ("revision", "main")
        if repository not in self.server.files:
            status, code = MISSING.get(repository, (401, "RepoNotFound"))
            self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": "no"})
        elif revision not in ("main", COMMIT, "v2"):
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif kind == "revision":
            files = [{"rfilename": name} for name in self.server.files[repository]]
            about = {"id": repository, "sha": COMMIT, "siblings": files}
            self._answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        elif kind == "resolve":
            self._file("/".join(parts[4:]), self.server.files[repository])
        else:
            self._answer(404, b"", {})

    def _file(self, name: str, files: dict[str, bytes]) -> None:
        data = files.get(name)
        if data is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if self.command == "GET":
            self.server.fetched.append(name)
        if asked is not None:
            self.server.ranges.append(asked)
            first = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self._answer(206, data[first:], headers)
        else:
            self._answer(200, data, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        server = self.server
        for start in range(0, len(body), 1 << 16):
            if server.cut and status == 200 and start >= server.cut:
                server.cut = 0
                self.close_connection = True
                self.wfile.flush()
                self.connection.close()
                return
            time.sleep(server.pause_s)
            self.wfile.write(body[start : start + (1 << 16)])

    def log_message(self, format: str, *args: Any) -> None:
        pass
