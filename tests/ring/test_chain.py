"""Machines in a chain of cables: only neighbours reach each other, and every collective is right all the same."""

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
import sys, time
import torch
from ringlm.errors import RingLMError
from ringlm.ring import RingConfig, connect
torch.set_num_threads(1)
try:
    with connect(RingConfig.from_env(), segment_bytes=1 << 14) as ring:
        n, rank = ring.world_size, ring.rank
        assert ring.topology == sys.argv[2], ring.topology
        def own(of, length=5):
            return torch.arange(length) % 7 + of * 1.0
        for length in (0, 5, 3000, 20_001, 300_000):
            for reduction in ("sum", "max", "avg"):
                ours = ring.all_reduce(own(rank, length), reduction)
                all_of_it = torch.stack([own(peer, length) for peer in range(n)])
                whole = {"sum": all_of_it.sum(0), "max": all_of_it.amax(0), "avg": all_of_it.mean(0)}[reduction]
                assert torch.equal(ours, whole), (length, reduction)
            half = ring.all_reduce(own(rank, length).bfloat16())
            assert torch.equal(half.float(), own(0, length) * n + n * (n - 1) / 2)
            assert torch.equal(ring.broadcast(half.clone(), n - 1), half)
        for root in range(n):
            assert torch.equal(ring.broadcast(own(rank), root), own(root))
            assert torch.equal(ring.reduce(own(rank), root), sum(map(own, range(n))) if rank == root else own(rank))
            pieces = ring.gather(own(rank, 5 + rank), root)
            assert pieces is None or all(torch.equal(p, own(r, 5 + r)) for r, p in enumerate(pieces))
            parts = [own(10 * peer) for peer in range(n)] if rank == root else None
            assert torch.equal(ring.scatter(parts, torch.zeros(5), root), own(10 * rank))
        assert all(torch.equal(p, own(r, 60_000 + r)) for r, p in enumerate(ring.all_gather(own(rank, 60_000 + rank))))
        assert torch.equal(ring.reduce_scatter([own(p) + rank for p in range(n)]), n * own(rank) + n * (n - 1) / 2)
        swapped = ring.all_to_all([own(10 * rank + peer, 9_000) for peer in range(n)])
        assert all(torch.equal(p, own(10 * peer + rank, 9_000)) for peer, p in enumerate(swapped))
        for peer in range(n):
            if peer != rank:
                ring.send(own(rank, 40_000), peer, tag=rank)
        for peer in range(n):
            if peer != rank:
                letter = torch.zeros(40_000)
                assert ring.recv(letter, peer, tag=peer) == peer
                assert torch.equal(letter, own(peer, 40_000))
        if rank != 1:
            ends = ring.group([0, 2, 3][: n - 1])
            assert ends.all_reduce(torch.ones(50_000)).eq(n - 1).all()
        ring.barrier()
        print("right", flush=True)
        if sys.argv[1] == "on":
            while True:
                ring.all_reduce(torch.ones(10))
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


class Machines:
    """`count` namespaces, and cables between those that are neighbours; with `ring` also from the last to the
    first. Cable c, from machine c, is the network 10.98.c.0/24, where it has .1 and the next machine .2."""

    def __init__(self, count: int, ring: bool) -> None:
        self.names = [f"ringchain{os.getpid()}-{rank}" for rank in range(count)]
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for cable in range(count if ring else count - 1):
            one, other = self.names[cable], self.names[(cable + 1) % count]
            ip("link", "add", f"right{cable}", "netns", one, "type", "veth", "peer", f"left{cable}", "netns", other)
            for name, device, host in ((one, f"right{cable}", 1), (other, f"left{cable}", 2)):
                ip("-n", name, "address", "add", f"10.98.{cable}.{host}/24", "dev", device)
                ip("-n", name, "link", "set", device, "up")

    def remove(self) -> None:
        for name in self.names:
            ip("netns", "delete", name)


@contextlib.contextmanager
def programs(machines: Machines, then: str, topology: str) -> Iterator[list[subprocess.Popen[str]]]:
    """PROGRAM on every machine, as one ring."""
    ranks = []
    try:
        for rank, name in enumerate(machines.names):
            environment = os.environ | {
                "RING_RANK": str(rank),
                "RING_WORLD_SIZE": str(len(machines.names)),
                "RING_PORT": "7600",
                "RING_RIGHT": "7600",
                "RING_RIGHT_IP": f"10.98.{rank}.2",
                "RING_SECRET": "one for all",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
            }
            command = ["ip", "netns", "exec", name, sys.executable, "-c", PROGRAM, then, topology]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate(timeout=20)


@needs_namespaces
@pytest.mark.parametrize(
    ("count", "ring", "topology"), [(4, False, "chain"), (4, True, "chain"), (3, False, "chain"), (2, False, "mesh")]
)
def test_every_collective_in_a_chain_of_cables(count: int, ring: bool, topology: str) -> None:
    machines = Machines(count, ring)
    try:
        with programs(machines, "end", topology) as ranks:
            for process in ranks:
                out, err = process.communicate(timeout=60)
                assert (process.returncode, out) == (0, "right\n"), err
    finally:
        machines.remove()


@needs_namespaces
@pytest.mark.parametrize("victim", [1, 3])
def test_a_machine_that_dies_in_a_chain_is_named_by_all(victim: int) -> None:
    """Also by those for whom other machines are out of reach with it."""
    machines = Machines(4, ring=False)
    try:
        with programs(machines, "on", "chain") as ranks:
            for process in ranks:
                assert process.stdout is not None
                assert process.stdout.readline() == "right\n"
            time.sleep(0.3)
            ranks[victim].kill()
            for rank, process in enumerate(ranks):
                if rank != victim:
                    _, err = process.communicate(timeout=20)
                    assert f"PeerLostError: rank {victim} " in err, (rank, err)
    finally:
        machines.remove()
