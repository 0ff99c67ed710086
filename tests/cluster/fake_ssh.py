"""What ssh does, on this machine: a command's input, output and status, and its end with the link. On PATH as `ssh`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path


def main() -> int:
    *options, mark, host, command = sys.argv[1:]
    assert mark == "--"
    with Path(os.environ["FAKE_SSH_LOG"]).open("a") as log:
        log.write(f"{os.getpid()} {host} {' '.join(options)} {command}\n")
    if host.endswith("nowhere"):
        sys.stderr.write("ssh: connect to host nowhere port 22: No route to host\n")
        return 255
    far = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, start_new_session=True)
    assert far.stdin is not None

    def forward() -> None:
        assert far.stdin is not None
        with far.stdin:
            while data := os.read(0, 1 << 16):
                far.stdin.write(data)
                far.stdin.flush()

    threading.Thread(target=forward, daemon=True).start()
    return far.wait()


if __name__ == "__main__":
    sys.exit(main())
