"""Machines that join are given ranks by their links: three hosts, with a slow cable between two of them."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ringlm.cluster.messages import Ready
from tests.namespaces import Meshed, needs_namespaces

RANK_0 = """
import sys
import msgspec
from ringlm import logs
from ringlm.cluster.client import EngineClient
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.ring import RingConfig
logs.inherit()
ring = RingConfig(port=7600, secret=b"one for all")
settings = Settings(format="plain", dtype="float32")
spec = EngineSpec(model=sys.argv[1], settings=settings, ring=ring, awaits=3, threads=1, rejoin_timeout_s=30.0)
client = EngineClient.start(spec, lambda progress: print(progress.stage, flush=True))
print(msgspec.json.encode(client.ready).decode(), flush=True)
client.close()
"""


@pytest.fixture
def hosts() -> Iterator[Meshed]:
    with Meshed(3) as made:
        yield made


@needs_namespaces
def test_who_has_a_slow_cable_to_rank_0_is_not_its_neighbour(hosts: Meshed, tiny_llama: Path) -> None:
    hosts.throttle(0, 1, "50mbit")
    first = hosts.start(0, "-c", RANK_0, str(tiny_llama))
    said = spoken(first, "waiting for 2 ranks")
    for host in (1, 2):  # in this order: host 1 has rank 2 all the same
        here = hosts.address(0, host)
        hosts.start(host, "-m", "ringlm", "join", here, "-m", str(tiny_llama), "--threads", "1")
        said = spoken(first, "waiting for 1 rank " if host == 1 else "measured")
    links = {(link.rank, link.other): link for link in msgspec.json.decode(said, type=Ready).measured}
    assert list(links) == [(0, 1), (0, 2), (1, 2)]
    assert 0.4 < links[0, 2].to_other_bytes_per_s / (50e6 / 8) < 1.15  # less where a machine has other work
    assert min(links[0, 1].to_other_bytes_per_s, links[1, 2].to_other_bytes_per_s) > 2 * 50e6 / 8
    _, err = first.communicate(timeout=90)
    assert first.returncode == 0
    assert "by these links ranks 1 to 2 go to who joined as number 2, 1" in err
    assert re.search(r"ranks 0 and 2: round trip [\d.]+ ms, [2-5]\d Mbit/s there", err)


def spoken(process: subprocess.Popen[str], what: str) -> str:
    """The line of its output with that in it, within a minute; else it is ended, and what it complained of shown."""
    alarm = threading.Timer(60.0, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        found = next((line for line in process.stdout if what in line), "")
    finally:
        alarm.cancel()
    assert found, process.communicate(timeout=90)[1]
    return found
