"""`ringlm status`, on servers that are well, not well, not there, and not ringlm's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ringlm.cluster.local import free_ports
from ringlm.frontend.cli import main

REPORT = {
    "model": "llama",
    "state": "ready",
    "reason": None,
    "epoch": 2,
    "recoveries": 1,
    "spares": 3,
    "world_size": 2,
    "full_world_size": 3,
    "dtype": "bfloat16",
    "quant": "int4",
    "context": 4096,
    "tokens_per_s": 12.34,
    "ranks": [
        {
            "rank": 0,
            "device": "cpu",
            "threads": 4,
            "weights_bytes": 2_500_000_000,
            "peak_bytes": 1,
            "link": None,
            "slow": None,
        },
        {
            "rank": 1,
            "device": "cuda:0",
            "threads": 1,
            "weights_bytes": 1_000_000,
            "peak_bytes": 2_000_000,
            "slow": 2.5,
            "link": {"rank": 1, "sent_bytes": 3_000_000, "received_bytes": 4_000_000, "round_trip_s": 0.00123},
        },
    ],
}
LOST = {"error": {"message": "rank 1 (b:1500) is lost.", "type": "server_error", "param": None, "code": None}}
ANSWERS: dict[str, tuple[int, object]] = {}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = ANSWERS[self.path]
        if self.path == "/v1/ring" and self.headers["Authorization"] != "Bearer key":
            status, body = 401, {}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("RINGLM_API_KEY", "key")
    ANSWERS.update({"/health": (200, {"status": "ok", "world_size": 2}), "/v1/ring": (200, REPORT)})
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(90)
    server.server_close()


@pytest.mark.parametrize("written", ["{}", "{}/", "{}/v1"])
def test_a_ring_that_is_well(url: str, written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", written.format(url)]) == 0
    out = capsys.readouterr().out
    assert (
        "llama · bfloat16 int4 · context 4,096 · world size 2 of 3 · 12.3 tok/s · formed again: 1 · spares: 3\n" in out
    )
    (second,) = (line for line in out.splitlines() if line.startswith(" 1 "))
    assert second.split("  ")[-1].strip() == "2.5 times"
    assert "4.0 MB" in second
    assert "cuda:0" in second
    assert "1.23 ms" in second
    assert "2.50 GB" in out


def test_a_ring_that_is_formed_again(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    ANSWERS["/health"] = (503, {"status": "degraded", "world_size": 2, "rank": 1, "reason": "rank 1 is lost."})
    assert main(["status", url]) == 1
    assert capsys.readouterr().err == f"ringlm: RingError: {url}: rank 1 is lost.\n"


def test_a_rank_is_lost(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    ANSWERS["/health"] = (503, LOST)
    assert main(["status", url.removeprefix("http://")]) == 1
    captured = capsys.readouterr()
    assert "llama" in captured.out
    assert captured.err == f"ringlm: RingError: {url}: rank 1 (b:1500) is lost.\n"
    assert main(["status", url, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["healthy"], said["reason"]) == (False, "rank 1 (b:1500) is lost.")
    assert said["ring"]["ranks"][1]["device"] == "cuda:0"


def test_no_answer_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    assert main(["status", nobody]) == 1
    assert capsys.readouterr().err.startswith(f"ringlm: ConnectError: no server answers at {nobody}/health: ")
    assert main(["status", "http://[", "--json"]) == 1
    assert capsys.readouterr().out == ""
    ANSWERS["/v1/ring"] = (200, ["another program"])
    assert main(["status", url]) == 1
    assert "says what this version of ringlm does not understand" in capsys.readouterr().err
    assert main(["status", url, "--api-key", "wrong"]) == 2
    assert "asks for a key; give it with --api-key" in capsys.readouterr().err
