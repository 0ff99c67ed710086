"""A server that speaks OpenAI's API as far as a benchmark needs it, and misbehaves as a test wishes."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BEGIN, A_WORD = 3, 2  # tokens of a prompt: so many, and so many a word


@dataclass
class Behaviour:
    """`tricks` are used up by streamed requests in turn: a status, 'error', 'cut', 'empty', 'garbage', 'hang up'."""

    key: str | None = None
    completions: bool = True  # or chat alone
    knows_ignore_eos: bool = True
    usage: bool = True
    tricks: list[int | str] = field(default_factory=list)
    dies_after: int | None = None  # streamed requests; the last of them is cut off
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of streamed requests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        if self._allowed():
            if self.path == "/v1/models":
                self._json(200, {"object": "list", "data": [{"id": "first"}, {"id": "second"}]})
            else:
                self._error(404, "not here")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        behaviour = self.server.behaviour
        if not self._allowed():
            return
        paths = ["/v1/chat/completions", *(["/v1/completions"] if behaviour.completions else [])]
        if self.path not in paths:
            self._error(404, "not here")
        elif "ignore_eos" in body and not behaviour.knows_ignore_eos:
            self._error(400, "Unrecognized request argument supplied: ignore_eos")
        elif body.get("stream"):
            behaviour.bodies.append(body)
            self._stream(body, behaviour)
        else:
            self._json(200, {"choices": [], "usage": self._usage(body) if behaviour.usage else None})

    def _stream(self, body: dict[str, Any], behaviour: Behaviour) -> None:
        with self.server.lock:
            trick = behaviour.tricks.pop(0) if behaviour.tricks else None
            if behaviour.dies_after is not None:
                behaviour.dies_after -= 1
                if behaviour.dies_after <= 0:
                    trick = "hang up"
                    self.server.socket.close()
        if isinstance(trick, int):
            self._error(trick, "busy")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._answer(body, trick)
        if trick == "hang up":
            self.close_connection = True
        else:
            self._write(b"")

    def _answer(self, body: dict[str, Any], trick: str | None) -> None:
        chat = "chat" in self.path
        for number in range(body["max_tokens"]):
            if trick == "hang up" and number == 1:
                return
            if trick == "error" and number == 1:
                self._event({"error": {"message": "the ring is lost"}})
                return
            if trick == "garbage":
                self._event("no object")
                return
            text = "" if trick == "empty" else " word"
            self._event({"choices": [{"delta": {"content": text}} if chat else {"text": text}]})
        if trick == "cut":
            return
        self._event({"choices": [{"finish_reason": "length"}]})
        self._event({"choices": [], "usage": self._usage(body)})
        self._write(b"data: [DONE]\n\n")

    def _usage(self, body: dict[str, Any]) -> dict[str, int]:
        text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        return {"prompt_tokens": BEGIN + A_WORD * len(text.split()), "completion_tokens": body["max_tokens"]}

    def _event(self, value: object) -> None:
        self._write(f"data: {json.dumps(value)}\n\n".encode())

    def _write(self, data: bytes) -> None:
        """A chunk; an empty one ends the body."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _allowed(self) -> bool:
        key = self.server.behaviour.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._error(401, "Incorrect API key.")
        return False

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def _json(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has hung up is no news."""


@contextlib.contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """The address at which its API begins."""
    server = _Server(behaviour)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
