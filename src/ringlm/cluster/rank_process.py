"""One rank of a launch: a process here, or an ssh whose far end (`remote.py`) starts it; and again when it fails.

Signals to a rank elsewhere are bytes on ssh's input, since those that ssh itself gets end only ssh.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Any

import msgspec

from ringlm.cluster.hosts import Host
from ringlm.cluster.order import Order, how_ended
from ringlm.errors import ConfigError

_SSH_FAILED, _NOT_FOUND = 255, 127
_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 30.0
_KILL_S = 2.0  # for a rank elsewhere to be dead, before the ssh to it is

log = logging.getLogger("ringlm")


class RankProcess:
    """Started by `start`, then polled: polling is what starts it again. `restarts` is how often it still may be."""

    def __init__(
        self, number: int, order: Order, host: Host | None, python: str | None, restarts: int, parent_fd: int
    ) -> None:
        self.number = number
        self.host = host
        self.python = python or sys.executable
        self.restarts = restarts
        self.remote = host is not None and not host.here
        self._order = msgspec.structs.replace(order, folder=os.getcwd()) if self.remote else order
        self._parent_fd = parent_fd
        self._label = f"rank {number}" if host is None else f"rank {number} {host}"
        self._process: subprocess.Popen[bytes] | None = None
        self._pumps: list[threading.Thread] = []
        self._failures = 0
        self._due: float | None = None  # when to start it again

    def start(self) -> None:
        """Raises ConfigError where there is no ssh."""
        first = self.number == 0
        # Rank 0 on a terminal draws its progress there itself; otherwise all go through the prefix.
        own_stderr = first and not self.remote and sys.stderr.isatty()
        streams: dict[str, Any] = {
            "stdout": None if first else subprocess.PIPE,
            "stderr": None if own_stderr else subprocess.PIPE if first else subprocess.STDOUT,
        }
        if self.remote:
            assert self.host is not None
            command = self.host.ssh(self.python)
            try:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **streams)
            except FileNotFoundError:
                raise ConfigError("there is no ssh here, which --hosts needs; install OpenSSH's client.") from None
            self._process = process
            self._write(msgspec.json.encode(self._order) + b"\n")
        else:
            # Ctrl-C reaches rank 0 alone: it decides what that ends.
            streams |= {"stdin": None if first else subprocess.DEVNULL, "start_new_session": not first}
            process = self._process = self._order.start(self._parent_fd, **streams)
        stream = process.stderr if first else process.stdout
        if stream is not None:
            pump = threading.Thread(target=_prefix, args=(stream, self._label), daemon=True)
            pump.start()
            self._pumps.append(pump)

    @property
    def unreachable(self) -> int | None:
        """The status of an ssh that has started nothing, or whose link broke; None for a rank that ran."""
        status = self._process.returncode if self._process is not None else None
        return status if self.remote and status in (_SSH_FAILED, _NOT_FOUND) else None

    def poll(self) -> int | None:
        """The status with which it has ended for good, negative for a signal's number; None while it has not."""
        if self._process is None:
            return 1
        if self._due is not None and self.restarts:
            if time.monotonic() >= self._due:
                self._due = None
                self.restarts -= 1
                self.start()
            return None
        status = self._process.poll()
        if status is None or not self.restarts or not failed(status):
            return status
        pause_s = min(_BACKOFF_S * 2**self._failures, _LONGEST_BACKOFF_S)
        self._failures += 1
        self._due = time.monotonic() + pause_s
        log.warning(
            "%s %s; started again in %.1f s (restarts left: %d)", self._label, how_ended(status), pause_s, self.restarts
        )
        return None

    def signal(self, number: signal.Signals) -> None:
        """If it runs."""
        if self._process is None or self._process.poll() is not None:
            return
        if self.remote:
            self._write(bytes([number]))
        else:
            self._process.send_signal(number)

    def kill(self) -> None:
        """At once; an ssh that does not end with its rank as well."""
        self.signal(signal.SIGKILL)
        if self._process is None:
            return
        try:
            self._process.wait(_KILL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel holds it; nobody can do more
                self._process.wait(_KILL_S)

    def close(self) -> int:
        """Once it has ended, show its last words; its status."""
        for pump in self._pumps:
            pump.join(2.0)
        if self._process is None:
            return 1
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        status = self._process.returncode
        return -signal.SIGKILL if status is None else status

    def _write(self, data: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # polling will tell
            self._process.stdin.write(data)
            self._process.stdin.flush()


def failed(status: int) -> bool:
    """Whether another try may do better: not after the end of the ring, a mistake of the user's, or Ctrl-C."""
    return status == 1 or status < 0 or (status > 128 and status != 128 + signal.SIGINT)


def _prefix(stream: IO[bytes], label: str) -> None:
    """Copy a rank's lines to stderr, each behind its rank; a JSON object has it inside."""
    with stream:
        for line in stream:
            text = line.decode("utf-8", "replace").rstrip("\n")
            sys.stderr.write(f"{text}\n" if text.startswith("{") else f"[{label}] {text}\n")
            sys.stderr.flush()
