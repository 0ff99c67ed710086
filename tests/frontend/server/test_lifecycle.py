"""`ringlm serve` as a process, on an engine that repeats what it is asked: its start, its end, and mistakes."""

from __future__ import annotations

import contextlib
import http.client
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

from ringlm.errors import ConfigError
from ringlm.frontend.cli import main
from ringlm.frontend.server.auth import read_keys
from tests.frontend.fake import until

ROOT = Path(__file__).parents[3]
BODY = {"messages": [{"role": "user", "content": "word " * 40}], "stream": True}


class Server:
    """The process, from its first word to its end."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        variables = os.environ | {"PYTHONPATH": str(ROOT / "src"), **environment}
        command = [sys.executable, "-m", "tests.frontend.fake_cli", "serve", "-m", "demo", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        while not self.url and self.process.poll() is None:
            time.sleep(0.02)
        assert self.url, self.said
        self.port = int(self.url.split(":")[2].partition("/")[0])

    @property
    def url(self) -> str:
        lines = [line for line in self.said if "ready: http" in line]
        return lines[0].split()[2] if lines else ""

    def get(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status

    def listens(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def stream(self) -> http.client.HTTPResponse:
        """A stream that has begun."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=90)
        connection.request("POST", "/v1/chat/completions", json.dumps(BODY), {"Content-Type": "application/json"})
        return connection.getresponse()

    def end(self, timeout_s: float = 20) -> int:
        status = self.process.wait(timeout_s)
        self._reader.join(90)
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)


@contextlib.contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Server]:
    server = Server(*arguments, **environment)
    try:
        yield server
    finally:
        server.process.kill()
        server.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_answers_under_way_are_finished(number: signal.Signals) -> None:
    with serving(FAKE_DELAY_S="0.02") as server:
        assert server.get("/health") == 200
        response = server.stream()
        assert response.readline().startswith(b"data: ")
        server.process.send_signal(number)
        until(lambda: any("ending" in line for line in server.said))
        until(lambda: not server.listens())
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert server.end() == 0
        assert not any("Traceback" in line for line in server.said)
        assert any("POST /v1/chat/completions request_id=" in line and "status=200" in line for line in server.said)


def test_a_second_signal_ends_at_once() -> None:
    with serving(FAKE_DELAY_S="0.2") as server:
        response = server.stream()
        response.readline()
        server.process.terminate()
        until(lambda: any("ending" in line for line in server.said))
        start = time.monotonic()
        server.process.terminate()
        assert server.end() == 0
        assert time.monotonic() - start < 5


def test_the_drain_has_an_end() -> None:
    with serving("--drain-timeout", "0", FAKE_DELAY_S="0.2") as server:
        server.stream().readline()
        server.process.terminate()
        assert server.end(10) == 0


def test_a_lost_ring_is_told_and_ends_the_server() -> None:
    with serving("--log-json", FAKE_DELAY_S="0.05", FAKE_FAIL_AFTER="12") as server:
        events = server.stream().read().decode()
        assert "rank 1 is lost" in events
        assert "[DONE]" not in events
        assert server.get("/health") == 503
        assert server.end() == 1
        lines = [json.loads(line) for line in server.said]
        assert lines[-1]["event"].startswith("PeerLostError: rank 1 is lost")
        (access,) = [line for line in lines if line["event"] == "POST /v1/chat/completions"]
        assert (access["status"], len(access["request_id"])) == (200, 32)


def test_a_connection_that_sends_no_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(FAKE_HEAD_S="0.3") as server:
        for head in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow:"):
            with socket.create_connection(("127.0.0.1", server.port), 20) as sock:
                sock.sendall(head)
                assert sock.recv(1) == b""


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert main(["serve", "-m", "demo", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ringlm: ConfigError: port {port} of 127.0.0.1 is taken; give another with --port")
    assert error.count("\n") == 1


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# who asks\n\n one \ntwo\n")
    assert read_keys(["three"], file) == (b"three", b"one", b"two")
    file.write_text("# nobody\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys([], file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys([], tmp_path / "none")
    for bad in ("", "two words", "naïve"):
        with pytest.raises(ConfigError, match="no header can carry") as error:
            read_keys([bad], None)
        assert not bad or bad not in str(error.value)
