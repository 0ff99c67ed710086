"""Machines in a chain of cables: only neighbours reach each other, and every collective is right all the same."""

from __future__ import annotations

import time

import pytest

from tests.namespaces import Chained, needs_namespaces

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


@needs_namespaces
@pytest.mark.parametrize(
    ("count", "ring", "topology"), [(4, False, "chain"), (4, True, "chain"), (3, False, "chain"), (2, False, "mesh")]
)
def test_every_collective_in_a_chain_of_cables(count: int, ring: bool, topology: str) -> None:
    with Chained(count, closed=ring) as machines, machines.programs(PROGRAM, "end", topology) as ranks:
        for process in ranks:
            out, err = process.communicate(timeout=90)
            assert (process.returncode, out) == (0, "right\n"), err


@needs_namespaces
@pytest.mark.parametrize("victim", [1, 3])
def test_a_machine_that_dies_in_a_chain_is_named_by_all(victim: int) -> None:
    """Also by those for whom other machines are out of reach with it."""
    with Chained(4, closed=False) as machines, machines.programs(PROGRAM, "on", "chain") as ranks:
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "right\n"
        time.sleep(0.3)
        ranks[victim].kill()
        for rank, process in enumerate(ranks):
            if rank != victim:
                _, err = process.communicate(timeout=90)
                assert f"PeerLostError: rank {victim} " in err, (rank, err)
