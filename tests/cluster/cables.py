"""Hosts that are network namespaces, with a cable of its own between any two, each as slow as a test wants it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster.test_namespaces import ip

SECRET = "one for all"


class Cables:
    """`count` hosts; cable (i, j), i < j, is the network 10.97.(16 i + j).0/24, where host i has .1 and j .2."""

    def __init__(self, count: int) -> None:
        self.names = [f"ringcable{os.getpid()}-{host}" for host in range(count)]
        self._processes: list[subprocess.Popen[str]] = []
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for one, other in itertools.combinations(range(count), 2):
            here, there = self.names[one], self.names[other]
            ip("link", "add", f"to{other}", "netns", here, "type", "veth", "peer", f"to{one}", "netns", there)
            for name, device, host in ((here, f"to{other}", one), (there, f"to{one}", other)):
                peer = other if host == one else one
                ip("-n", name, "address", "add", f"{self.address(host, peer)}/24", "dev", device)
                ip("-n", name, "link", "set", device, "up")

    def address(self, host: int, peer: int) -> str:
        """Of a host, on its cable to another."""
        low, high = min(host, peer), max(host, peer)
        return f"10.97.{16 * low + high}.{1 if host == low else 2}"

    def throttle(self, host: int, peer: int, mbit: int) -> None:
        """What a host sends to another from now on."""
        rate = ["rate", f"{mbit}mbit", "burst", "32kb", "latency", "50ms"]
        device = ["dev", f"to{peer}", "root", "tbf"]
        command = ["tc", "-n", self.names[host], "qdisc", "add", *device, *rate]
        subprocess.run(command, check=True, capture_output=True, timeout=10)

    def start(self, host: int, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Python with these arguments on a host; ended with the hosts."""
        variables = os.environ | {"RING_SECRET": SECRET, "RINGLM_LOG": "info"} | environment
        variables["PYTHONPATH"] = str(Path(__file__).parents[2] / "src")
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        arguments = ["ip", "netns", "exec", self.names[host], sys.executable, *command]
        process = subprocess.Popen(arguments, env=variables, stdin=subprocess.DEVNULL, start_new_session=True, **pipes)
        self._processes.append(process)
        return process

    def remove(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate(timeout=20)
        for name in self.names:
            ip("netns", "delete", name)
