"""`ringlm launch`: all ranks of a local ring from one terminal, each with the same command line.

Rank 0 has the terminal: its input and output are the launcher's own. The others' output goes to stderr
behind their rank. When one ends the rest are ended; when the launcher is killed they end by themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import IO

from ringlm.cluster.local import LOOPBACK, local_ring
from ringlm.cluster.parent import VARIABLE
from ringlm.errors import ConfigError
from ringlm.ring.config import RingConfig

_GRACE_S = 5.0  # for ranks to end by themselves once one of them has
_TERMINATE_S = 5.0
_POLL_S = 0.05


def launch(argv: list[str], world_size: int) -> int:
    """Run `ringlm ARGV` once a rank; the exit status: rank 0's, or that of the first daemon that failed."""
    if world_size < 1:
        raise ConfigError(f"-n is {world_size}; a ring has 1 rank or more.")
    if RingConfig.present():
        raise ConfigError(
            "the environment describes a ring already (RING_* or a launcher's); unset it, or run without launch."
        )
    reader, writer = os.pipe()
    try:
        return _Launch(argv, world_size, reader).run()
    finally:
        os.close(writer)
        os.close(reader)


class _Launch:
    """The processes of one ring, until all have ended."""

    def __init__(self, argv: list[str], world_size: int, parent_fd: int) -> None:
        self._asked = False  # by a signal to end
        self._terminated = False  # again
        self._pumps: list[threading.Thread] = []
        command = [sys.executable, "-m", "ringlm", *argv]
        self._ranks: list[subprocess.Popen[bytes]] = []
        configs = local_ring(world_size) if world_size > 1 else [RingConfig()]
        for config in configs:
            environment = os.environ | _environment(config) | {VARIABLE: str(parent_fd)}
            first = config.rank == 0
            # Rank 0 on a terminal draws its progress there itself; otherwise all go through the prefix.
            own_stderr = first and sys.stderr.isatty()
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=None if first else subprocess.DEVNULL,
                stdout=None if first else subprocess.PIPE,
                stderr=None if own_stderr else subprocess.PIPE if first else subprocess.STDOUT,
                pass_fds=(parent_fd,),
                # Ctrl-C reaches rank 0 alone: it decides what that ends.
                start_new_session=not first,
            )
            self._ranks.append(process)
            stream = process.stdout if not first else process.stderr
            if stream is not None:
                pump = threading.Thread(target=_prefix, args=(stream, config.rank), daemon=True)
                pump.start()
                self._pumps.append(pump)

    def run(self) -> int:
        with self._signals():
            first = self._first_to_end()
            self._end_rest()
        for pump in self._pumps:
            pump.join(2.0)
        statuses = [process.returncode for process in self._ranks]
        # What rank 0 has to say of a daemon's end is the better account, unless it had to be ended itself.
        status = statuses[0] if statuses[0] > 0 else statuses[first]
        return 128 - status if status < 0 else int(status)

    def _first_to_end(self) -> int:
        """The rank that ended first with an error, or rank 0, once there is one."""
        while True:
            for rank, process in enumerate(self._ranks):
                status = process.poll()
                if status is not None and (rank == 0 or status != 0):
                    return rank
            if self._terminated:
                return 0
            time.sleep(_POLL_S)

    def _end_rest(self) -> None:
        """Every process, in order where it still can."""
        if not self._terminated:
            self._wait(_GRACE_S)
        for process in self._ranks:
            if process.poll() is None:
                process.terminate()
        self._wait(_TERMINATE_S)
        for process in self._ranks:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and any(process.poll() is None for process in self._ranks):
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def interrupt(signum: int, frame: FrameType | None) -> None:
            if not _terminal_interrupts():  # else rank 0 has it from there
                self._ranks[0].send_signal(signal.SIGINT)

        def terminate(signum: int, frame: FrameType | None) -> None:
            # The first is rank 0's, which ends the ring in order, and a server after its last answers.
            self._terminated = self._asked
            self._asked = True
            self._ranks[0].terminate()

        before = {signal.SIGINT: signal.signal(signal.SIGINT, interrupt)}
        for number in (signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, terminate)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _environment(config: RingConfig) -> dict[str, str]:
    """The variables from which a child makes `config` again."""
    variables = {"RING_RANK": str(config.rank), "RING_WORLD_SIZE": str(config.world_size)}
    if config.right is not None and config.secret is not None:
        variables |= {
            "RING_PORT": str(config.port),
            "RING_RIGHT": str(config.right.port),
            "RING_RIGHT_IP": config.right.host,
            "RING_SECRET": config.secret.decode(),
            "RING_INTERFACE": LOOPBACK,
        }
    return variables


def _terminal_interrupts() -> bool:
    """Whether Ctrl-C at this terminal goes to rank 0 too, being in the same foreground group."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def _prefix(stream: IO[bytes], rank: int) -> None:
    """Copy a rank's lines to stderr, each behind its rank; a JSON object has it inside."""
    with stream:
        for line in stream:
            text = line.decode("utf-8", "replace").rstrip("\n")
            sys.stderr.write(f"{text}\n" if text.startswith("{") else f"[rank {rank}] {text}\n")
            sys.stderr.flush()
