"""`ringlm launch`: all ranks of a ring from one terminal, each with the same command line, here or over ssh.

Rank 0 has the terminal: its output is the launcher's own, and its input where it runs here. The others' output goes to
stderr behind their rank. When one ends for good the rest are ended, unless rank 0 is to survive that; when the launcher
is killed they end by themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from ringlm import logs
from ringlm.cluster.hosts import Host, parse_hosts, ring_of
from ringlm.cluster.local import local_ring
from ringlm.cluster.order import Order, exit_status
from ringlm.cluster.rank_process import RankProcess, failed
from ringlm.errors import ConfigError, ConnectError
from ringlm.ring.config import DEFAULT_PORT, RingConfig

_GRACE_S = 5.0  # for ranks to end by themselves once one of them has
_TERMINATE_S = 12.0  # longer than a frontend waits for its engine, which nobody else would end
_POLL_S = 0.05

log = logging.getLogger("ringlm")


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """Where the ranks run, and how often a daemon may be started again.

    world_size: of a ring on this machine, or as many as there are hosts. port: the ring's on every host.
    python: the path of a Python with ringlm on the hosts, this one's if None.
    """

    world_size: int | None = None
    hosts: str | None = None
    port: int = DEFAULT_PORT
    python: str | None = None
    restarts: int = 0


def launch(argv: list[str], options: LaunchOptions) -> int:
    """Run `ringlm ARGV` once a rank; the exit status: rank 0's, or that of the first daemon that failed.

    Raises ConfigError, and ConnectError for a host that ssh does not reach.
    """
    if RingConfig.present():
        raise ConfigError(
            "the environment describes a ring already (RING_* or a launcher's); unset it, or run without launch."
        )
    if options.restarts < 0:
        raise ConfigError(f"--restarts is {options.restarts}; it must be 0 or more.")
    logs.inherit()
    hosts = parse_hosts(options.hosts) if options.hosts is not None else None
    reader, writer = os.pipe()
    try:
        return _Launch([*_ranks(argv, options, hosts, reader)], _survives(argv)).run()
    finally:
        os.close(writer)
        os.close(reader)


def _ranks(
    argv: list[str], options: LaunchOptions, hosts: tuple[Host, ...] | None, parent_fd: int
) -> Iterator[RankProcess]:
    """What is to run where."""
    size = options.world_size if options.world_size is not None else len(hosts or ())
    if size < 1:
        raise ConfigError(f"-n is {size}; a ring has 1 rank or more.")
    if hosts is None:
        configs = local_ring(size) if size > 1 else [RingConfig()]
    elif len(hosts) != size:
        raise ConfigError(f"-n is {size}, but --hosts names {len(hosts)}; leave -n out, or name a host for each rank.")
    else:
        configs = ring_of(hosts, options.port)
    for config in configs:
        secret = None if config.secret is None else config.secret.decode()
        order = Order(argv=argv, environment=_environment(config), secret=secret)
        host = hosts[config.rank] if hosts is not None else None
        restarts = options.restarts if config.rank != 0 else 0  # whose end is the launch's
        yield RankProcess(config.rank, order, host, options.python, restarts, parent_fd)


def _environment(config: RingConfig) -> dict[str, str]:
    """The variables from which a rank makes `config` again, the secret aside, and logs alike."""
    variables = {"RING_RANK": str(config.rank), "RING_WORLD_SIZE": str(config.world_size)}
    if config.right is not None:
        variables |= {
            "RING_PORT": str(config.port),
            "RING_RIGHT": str(config.right.port),
            "RING_RIGHT_IP": config.right.host,
        }
    if config.interface is not None:
        variables["RING_INTERFACE"] = config.interface
    return variables | {name: os.environ[name] for name in logs.VARIABLES if name in os.environ}


def _survives(argv: list[str]) -> bool:
    """Whether rank 0 waits for a lost daemon, and may go on without it: as it was told, and a server untold."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == "--rejoin-timeout":
            return bool((value or following).strip("0."))
    return argv[:1] == ["serve"]


class _Launch:
    """The processes of one ring, until all have ended; with `survives` rank 0 decides what the loss of one means."""

    def __init__(self, ranks: list[RankProcess], survives: bool) -> None:
        self._survives = survives
        self._lost: set[int] = set()
        self._asked = False  # by a signal to end
        self._terminated = False  # again
        self._ranks = ranks

    def run(self) -> int:
        with self._signals():
            try:
                for rank in self._ranks:
                    rank.start()
                first = self._first_to_end()
            finally:
                self._end_rest(patient=not any(rank.unreachable for rank in self._ranks))
        statuses = [rank.close() for rank in self._ranks]
        if self._ranks[first].unreachable:
            _explain(self._ranks[first])
        # What rank 0 has to say of a daemon's end is the better account, unless it had to be ended itself.
        return exit_status(statuses[0] if statuses[0] > 0 else statuses[first])

    def _first_to_end(self) -> int:
        """The rank that ended first with an error, or rank 0, once there is one."""
        while True:
            for rank in self._ranks:
                status = rank.poll()
                if status is None or rank.number in self._lost:
                    continue
                if rank.number and self._survives and failed(status) and not rank.unreachable:
                    self._lost.add(rank.number)
                    log.warning("rank %d ended with status %d; rank 0 goes on", rank.number, exit_status(status))
                elif rank.number == 0 or status != 0:
                    return rank.number
            if self._terminated:
                return 0
            time.sleep(_POLL_S)

    def _end_rest(self, patient: bool) -> None:
        """Every process, in order where it still can, and of its own accord with patience."""
        for rank in self._ranks:
            rank.restarts = 0
        if patient and not self._terminated:
            self._wait(_GRACE_S)
        for rank in self._ranks:
            rank.signal(signal.SIGTERM)
        self._wait(_TERMINATE_S)
        for rank in self._ranks:
            rank.kill()

    def _wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and any(rank.poll() is None for rank in self._ranks):
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def interrupt(signum: int, frame: FrameType | None) -> None:
            if self._ranks[0].remote or not _terminal_interrupts():  # else rank 0 has it from there
                self._ranks[0].signal(signal.SIGINT)

        def terminate(signum: int, frame: FrameType | None) -> None:
            # The first is rank 0's, which ends the ring in order, and a server after its last answers.
            self._terminated = self._asked
            self._asked = True
            self._ranks[0].signal(signal.SIGTERM)

        before = {signal.SIGINT: signal.signal(signal.SIGINT, interrupt)}
        for number in (signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, terminate)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _explain(rank: RankProcess) -> NoReturn:
    """Why no rank has run there; ssh's or the shell's own words have been shown."""
    if rank.unreachable == 127:
        raise ConfigError(f"there is no {rank.python} on {rank.host}; name a Python with ringlm by --python PATH.")
    raise ConnectError(
        f"rank {rank.number} could not be started on {rank.host}, or the link to it broke; see that "
        f"'ssh {rank.host} true' works and asks for no password."
    )


def _terminal_interrupts() -> bool:
    """Whether Ctrl-C at this terminal goes to rank 0 too, being in the same foreground group."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
