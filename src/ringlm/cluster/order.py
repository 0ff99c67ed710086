"""What a launcher starts a rank with. The secret goes through an inherited descriptor: neither the rank's arguments nor
its environment, which others on its machine may list, ever hold it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import msgspec

from ringlm.cluster.parent import VARIABLE

LONGEST = 1 << 16  # bytes of an order on its way to another machine


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """`ringlm ARGV` with these variables, and with the ring's secret if it has one."""

    argv: list[str]
    environment: dict[str, str]
    secret: str | None = None
    folder: str | None = None  # to start in, where it exists

    def start(self, parent_fd: int, **streams: Any) -> subprocess.Popen[bytes]:
        """Start the rank here; `parent_fd` reaches its end of file when whoever started it is gone."""
        environment = os.environ | self.environment | {VARIABLE: str(parent_fd)}
        environment.pop("RING_SECRET", None)
        fds = [parent_fd]
        if self.secret is not None:
            reader, writer = os.pipe()
            with os.fdopen(writer, "w") as pipe:
                pipe.write(self.secret)  # far below what a pipe holds
            fds.append(reader)
            environment["RING_SECRET_FILE"] = f"/dev/fd/{reader}"
        command = [sys.executable, "-m", "ringlm", *self.argv]
        try:
            return subprocess.Popen(command, env=environment, pass_fds=fds, **streams)
        finally:
            for fd in fds[1:]:
                os.close(fd)


def exit_status(returncode: int) -> int:
    """A process's end as a shell tells it."""
    return 128 - returncode if returncode < 0 else returncode


def how_ended(status: int) -> str:
    """A process's end in words."""
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


def end(process: subprocess.Popen[bytes], patience_s: float, kill_s: float) -> bool:
    """Wait for a process's end, by force after `patience_s`; whether it has ended by itself."""
    try:
        process.wait(max(0.0, patience_s))
        return True
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(kill_s)
        return False
