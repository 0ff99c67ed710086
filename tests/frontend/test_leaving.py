"""No process is left behind, however the one that started it ends, and nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

START = """
import os, sys, time
from ringlm import LLM, SamplingParams
llm = LLM({model!r}, tensor_parallel=2, dtype="float32")
print(*[process.pid for process in llm._session._engine._processes], flush=True)
endless = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)
"""
ENDS = {
    "an exception": ("llm.generate([[1, 5]], SamplingParams(max_tokens=3)); raise ValueError('mine')", 1),
    "a stream is left": ("next(llm._session.complete([1, 5], endless).pieces())", 0),
    "another thread waits": (
        "import threading; threading.Thread(target=llm.generate, args=([[1, 5]], endless), daemon=True).start(); "
        "time.sleep(0.2)",
        0,
    ),
    "SIGKILL": ("llm._session.complete([1, 5], endless); os.kill(os.getpid(), 9)", -9),
    "it is dropped": ("llm = None; time.sleep(0.5); os._exit(0)", 0),
}


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_behind(tiny_llama: Path, end: str) -> None:
    code, status = ENDS[end]
    script = subprocess.Popen(
        [sys.executable, "-c", START.format(model=str(tiny_llama)) + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = script.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        script.send_signal(signal.SIGKILL)
        raise
    assert script.returncode == status, err.decode()
    pids = [int(pid) for pid in out.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 90
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if status != -9:  # in order, and so without a word of the ranks
        assert not any(line.startswith(b"ringlm: ") for line in err.splitlines())
