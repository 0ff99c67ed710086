"""SIGTERM at all ranks at once, as systems do that end a job: answers under way are finished first."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ringlm.cluster.local import free_ports


def test_all_ranks_are_told_to_end_amid_an_answer(tiny_llama: Path, tmp_path: Path) -> None:
    left, right, port = free_ports(3)
    ranks = []
    for rank, (own, other) in enumerate(((left, right), (right, left))):
        environ = {"RING_RANK": str(rank), "RING_WORLD_SIZE": "2", "RING_PORT": str(own), "RING_RIGHT": str(other)}
        command = [sys.executable, "-m", "ringlm", "serve", "-m", str(tiny_llama), "--port", str(port)]
        with (tmp_path / str(rank)).open("w") as log:
            ranks.append(subprocess.Popen(command, env=os.environ | environ | {"OMP_NUM_THREADS": "1"}, stderr=log))
    try:
        deadline = time.monotonic() + 90
        while "ready: http" not in (tmp_path / "0").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
        body = {"prompt": [1, 5], "max_tokens": 1000, "ignore_eos": True, "stream": True, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        *_, usage, done, _ = answer.read().decode().split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 1000
        assert [process.wait(90) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
