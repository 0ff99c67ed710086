"""Hosts for tests: network namespaces with addresses of their own, on a switch or in a chain of cables."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=90)


def _can_make_namespaces() -> bool:
    name = f"ringlm-probe-{os.getpid()}"
    with contextlib.suppress(subprocess.SubprocessError, FileNotFoundError):
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
        return True
    return False


needs_namespaces = pytest.mark.skipif(
    shutil.which("ip") is None or not _can_make_namespaces(),
    reason="network namespaces need root and iproute2",
)


class Hosts:
    """Namespaces by `names`; `rights` is where each finds its right neighbour."""

    def __init__(self, count: int) -> None:
        self._stem = f"ringlm{os.getpid()}"
        self.names = [f"{self._stem}-{rank}" for rank in range(count)]
        self.rights: list[str] = []
        self._all: list[str] = []
        for name in self.names:
            self._add(name)

    def cable(self, one: str, device: str, other: str, end: str, address: str = "", far: str = "") -> None:
        """From `device` of one namespace to `end` of another, which have these addresses if any."""
        _ip("link", "add", device, "netns", one, "type", "veth", "peer", end, "netns", other)
        for name, port, host in ((one, device, address), (other, end, far)):
            if host:
                _ip("-n", name, "address", "add", f"{host}/24", "dev", port)
            _ip("-n", name, "link", "set", port, "up")

    @contextlib.contextmanager
    def programs(self, source: str, *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
        """A Python program on every host, the ranks of one ring."""
        ranks = []
        try:
            for rank, (name, right) in enumerate(zip(self.names, self.rights, strict=True)):
                environment = os.environ | {
                    "RING_RANK": str(rank),
                    "RING_WORLD_SIZE": str(len(self.names)),
                    "RING_PORT": "7600",
                    "RING_RIGHT": "7600",
                    "RING_RIGHT_IP": right,
                    "RING_SECRET": "one for all",
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
                }
                command = ["ip", "netns", "exec", name, sys.executable, "-c", source, *arguments]
                pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
                ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, text=True, **pipes))
            yield ranks
        finally:
            for process in ranks:
                process.kill()
                process.communicate(timeout=90)

    def _add(self, name: str) -> None:
        _ip("netns", "add", name)
        self._all.append(name)
        _ip("-n", name, "link", "set", "lo", "up")

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._all:
            _ip("netns", "delete", name)


class Switched(Hosts):
    """Each with one cable to a switch; host r is 10.99.0.(r + 1)."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._switch = f"{self._stem}-switch"
        self.rights = [f"10.99.0.{(rank + 1) % count + 1}" for rank in range(count)]
        self._add(self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for rank, name in enumerate(self.names):
            self.cable(name, "eth0", self._switch, f"port{rank}", f"10.99.0.{rank + 1}")
            self.plug(rank)

    def plug(self, rank: int) -> None:
        _ip("-n", self._switch, "link", "set", f"port{rank}", "master", "br0")

    def unplug(self, rank: int) -> None:
        """Nothing comes through that host's cable any more, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"port{rank}", "nomaster")

    def throttle(self, rank: int, rate: str) -> None:
        """What that host sends goes at `rate`, in tc's words."""
        tc = ["tc", "-n", self.names[rank], "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate]
        subprocess.run([*tc, "burst", "4kb", "latency", "100ms"], check=True, capture_output=True, timeout=90)


class Chained(Hosts):
    """Cables between neighbours only, with `closed` also from the last to the first. Cable c, from host c, is network
    10.98.c.0/24, where that has .1 and the next host .2."""

    def __init__(self, count: int, *, closed: bool) -> None:
        super().__init__(count)
        self.rights = [f"10.98.{rank}.2" for rank in range(count)]
        for cable in range(count if closed else count - 1):
            one, other = self.names[cable], self.names[(cable + 1) % count]
            self.cable(one, f"right{cable}", other, f"left{cable}", f"10.98.{cable}.1", f"10.98.{cable}.2")


class Meshed(Hosts):
    """A cable between any two. That of hosts i < j is network 10.97.(16 i + j).0/24, where i has .1 and j .2."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._started: list[subprocess.Popen[str]] = []
        for one, other in itertools.combinations(range(count), 2):
            ends = self.address(one, other), self.address(other, one)
            self.cable(self.names[one], f"to{other}", self.names[other], f"to{one}", *ends)

    def address(self, host: int, peer: int) -> str:
        """Of a host, on its cable to another."""
        low, high = min(host, peer), max(host, peer)
        return f"10.97.{16 * low + high}.{1 if host == low else 2}"

    def throttle(self, host: int, peer: int, rate: str) -> None:
        """What a host sends to another goes at `rate`, in tc's words."""
        tc = ["tc", "-n", self.names[host], "qdisc", "replace", "dev", f"to{peer}", "root", "tbf", "rate", rate]
        subprocess.run([*tc, "burst", "32kb", "latency", "50ms"], check=True, capture_output=True, timeout=90)

    def start(self, host: int, *arguments: str) -> subprocess.Popen[str]:
        """Python on a host, which ends with the hosts; its log is on stderr."""
        environment = os.environ | {"RING_SECRET": "one for all", "RINGLM_LOG": "info", "PYTHONPATH": str(ROOT / "src")}
        command = ["ip", "netns", "exec", self.names[host], sys.executable, *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(command, env=environment, start_new_session=True, text=True, **pipes)
        self._started.append(process)
        return process

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()
            process.communicate(timeout=90)
        super().__exit__()
