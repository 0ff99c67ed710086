"""`ringlm top`: in a pipe, as JSON, in a terminal, with a rank that is lost."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from ringlm.frontend.cli import main
from tests.frontend.test_status_command import ANSWERS, REPORT, url

__all__ = ["url"]  # a fixture

BUSY = REPORT | {
    "running": 2,
    "waiting": 1,
    "cache": {"blocks": 100, "in_use": 30, "cached": 20},
    "step": {"seconds": 0.02, "ring_s": 0.005},
    "links": [
        {"ranks": [0, 1], "there_per_s": 1_500_000, "back_per_s": 2500, "round_trip_s": 0.00123},
        {"ranks": [1, 2], "there_per_s": 0, "back_per_s": 0, "round_trip_s": None},
    ],
}


def test_once_in_a_pipe(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    ANSWERS["/v1/ring"] = (200, BUSY)
    assert main(["top", url]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "llama · bfloat16 int4 · world size 2 · ready · formed again: 1" in lines
    assert f"a step {'█' * 30}{'▒' * 10} 20.0 ms = computing 15.0 + ring 5.0" in lines
    assert any("30 of 100 blocks in use, 20 kept" in line for line in lines)
    assert "requests 2 running, 1 waiting" in lines
    assert "1 cuda:0 1 0% 1.0 MB 2.0 MB 2.5 times slower" in lines
    assert "0 - 1 1.23 ms 1.5 MB/s 2.5 kB/s" in lines
    assert any("12.3 now" in line for line in lines)


def test_a_lost_rank_and_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    lost = BUSY | {"state": "recovering", "lost": 1, "reason": "rank 1 ended."}
    ANSWERS["/v1/ring"] = (200, lost)
    assert main(["top", "--once", url]) == 0
    said = capsys.readouterr().out
    assert "rank 1 is lost, and awaited: rank 1 ended." in said
    assert "0.0 now" in said
    assert main(["top", "--json", url]) == 0
    assert json.loads(capsys.readouterr().out).items() >= {"lost": 1, "links": BUSY["links"]}.items()
    ANSWERS["/v1/ring"] = (503, {})
    ANSWERS["/health"] = (503, {"error": {"message": "gone", "type": "x", "param": None, "code": None}})
    assert main(["top", url]) == 1
    assert capsys.readouterr().err == f"ringlm: RingError: {url}: gone\n"


def test_in_a_terminal_until_ctrl_c(url: str) -> None:
    ANSWERS["/v1/ring"] = (200, BUSY)
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "ringlm", "top", url], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    said, deadline = b"", time.monotonic() + 90
    while said.count(b"llama") < 2:  # drawn, and drawn again
        assert time.monotonic() < deadline
        said += os.read(master, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 130
    os.close(master)
