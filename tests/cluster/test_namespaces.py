"""Ranks on hosts of their own, with addresses of their own: network namespaces on one switch."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = """
import sys
from ringlm import LLM, SamplingParams
from ringlm.errors import RingLMError
try:
    with LLM(sys.argv[1], dtype="float32") as llm:
        print("ready", flush=True)
        params = SamplingParams(max_tokens=int(sys.argv[2]), temperature=0, ignore_eos=True)
        print(*llm.generate([[1, 5, 9]], params)[0].token_ids, flush=True)
except RingLMError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


def can_make_namespaces() -> bool:
    name = f"ringlm-probe-{os.getpid()}"
    with contextlib.suppress(subprocess.SubprocessError, FileNotFoundError):
        ip("netns", "add", name)
        ip("netns", "delete", name)
        return True
    return False


needs_namespaces = pytest.mark.skipif(
    shutil.which("ip") is None or not can_make_namespaces(),
    reason="network namespaces need root and iproute2",
)


class Hosts:
    """`count` namespaces, each with one cable to a switch; host r is 10.99.0.(r + 1)."""

    def __init__(self, count: int) -> None:
        stem = f"ringlm{os.getpid()}"
        self.switch = f"{stem}-switch"
        self.names = [f"{stem}-{rank}" for rank in range(count)]
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")
        for rank, name in enumerate(self.names):
            ip("netns", "add", name)
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", f"port{rank}", "netns", self.switch)
            ip("-n", self.switch, "link", "set", f"port{rank}", "master", "br0", "up")
            ip("-n", name, "address", "add", f"{self.address(rank)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def address(self, rank: int) -> str:
        return f"10.99.0.{rank + 1}"

    def unplug(self, rank: int) -> None:
        """Nothing comes through that host's cable any more, and nobody is told."""
        ip("-n", self.switch, "link", "set", f"port{rank}", "nomaster")

    def remove(self) -> None:
        for name in (*self.names, self.switch):
            ip("netns", "delete", name)


@contextlib.contextmanager
def programs(
    hosts: Hosts, model: Path, tokens: int, secret: str = "one for all"
) -> Iterator[list[subprocess.Popen[str]]]:
    """PROGRAM on every host, as one ring."""
    count = len(hosts.names)
    ranks = []
    try:
        for rank, name in enumerate(hosts.names):
            environment = os.environ | {
                "RING_RANK": str(rank),
                "RING_WORLD_SIZE": str(count),
                "RING_PORT": "7600",
                "RING_RIGHT": "7600",
                "RING_RIGHT_IP": hosts.address((rank + 1) % count),
                "RING_SECRET": "one for all",
                "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
            }
            command = ["ip", "netns", "exec", name, sys.executable, "-c", PROGRAM, str(model), str(tokens)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate(timeout=20)


@pytest.fixture
def three_hosts() -> Iterator[Hosts]:
    hosts = Hosts(3)
    try:
        yield hosts
    finally:
        hosts.remove()


@needs_namespaces
def test_three_hosts_answer_together(three_hosts: Hosts, tiny_llama: Path) -> None:
    with programs(three_hosts, tiny_llama, 8) as ranks:
        out, err = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == 0, err
        assert len(out.split()) == 9  # "ready" and the tokens
        assert [process.wait(20) for process in ranks[1:]] == [0, 0]


@needs_namespaces
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_an_unplugged_host_is_named_by_the_others(three_hosts: Hosts, tiny_llama: Path, victim: int) -> None:
    with programs(three_hosts, tiny_llama, 4000) as ranks:
        assert ranks[0].stdout is not None
        assert ranks[0].stdout.readline() == "ready\n"
        time.sleep(0.5)
        three_hosts.unplug(victim)
        deadline = time.monotonic() + 10.0
        for rank, process in enumerate(ranks):
            if rank != victim:
                _, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                assert process.returncode == 1
                assert f"PeerLostError: rank {victim} " in err
