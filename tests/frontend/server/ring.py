"""A server of two ranks, as its users start it."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def serving(
    *options: str, model: str = "demo", restarts: int = 0, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A model, served; its launcher and the base URL. At the end of the block it has to leave in order."""
    command = [sys.executable, "-m", "ringlm", "launch", "-n", "2", "--restarts", str(restarts), "--"]
    command += ["serve", "-m", model, "--port", "0", "--dtype", "float32", *options]
    process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    ready: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen(lines: IO[str]) -> None:
        with lines:
            for line in lines:
                said.append(line)
                if found := re.search(r"ready: (http://\S+)", line):
                    ready.put(found[1])

    assert process.stderr is not None
    listener = threading.Thread(target=listen, args=(process.stderr,))
    listener.start()
    try:
        yield process, ready.get(timeout=90)
    finally:
        process.terminate()
        status = process.wait(90)
        listener.join(90)
    assert status == 0, said
    assert not any(secret in "".join(said) for secret in environment.values())
