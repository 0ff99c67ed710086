"""Every collective with a dead, a stopped and a late peer; and thousands of them in a row."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ringlm.ring import Ring
from tests.processes import Failure
from tests.ring.helpers import ProcessRing, attempt, each, thread_ring

N = 3
EVERY: dict[str, Callable[[Ring], Any]] = {
    "all_reduce": lambda ring: ring.all_reduce(torch.ones(10)),
    "large all_reduce": lambda ring: ring.all_reduce(torch.ones(200_000)),
    "reduce": lambda ring: ring.reduce(torch.ones(10)),
    "broadcast": lambda ring: ring.broadcast(torch.ones(10)),
    "gather": lambda ring: ring.gather(torch.ones(10)),
    "all_gather": lambda ring: ring.all_gather(torch.ones(10)),
    "scatter": lambda ring: ring.scatter([torch.ones(2)] * N if ring.rank == 0 else None, torch.ones(2)),
    "reduce_scatter": lambda ring: ring.reduce_scatter([torch.ones(10)] * N),
    "all_to_all": lambda ring: ring.all_to_all([torch.ones(10)] * N),
    "barrier": lambda ring: ring.barrier(),
    "broadcast_bytes": lambda ring: ring.broadcast_bytes(b"x" if ring.rank == 0 else None),
    "gather_bytes": lambda ring: ring.gather_bytes(b"x"),
    "send and recv": lambda ring: (
        [ring.send(torch.ones(4), peer) for peer in range(N) if peer != ring.rank]
        + [ring.recv(torch.ones(4), peer) for peer in range(N) if peer != ring.rank]
    ),
    "in the background": lambda ring: ring.submit(ring.all_gather, torch.ones(10)).wait(90.0),
}


def for_ever(ring: Ring, name: str) -> None:
    while True:
        EVERY[name](ring)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_every_collective_names_a_lost_peer(how: signal.Signals) -> None:
    victim = 2
    with contextlib.ExitStack() as stack:
        rings = {}
        for name in EVERY:  # all at once, since each takes as long as silence is borne
            rings[name] = ring = stack.enter_context(ProcessRing(N, heartbeat=(0.1, 3.0, 60.0)))
            for rank in range(N):
                ring.start(rank, for_ever, name)
            time.sleep(0.1)
            ring.signal(victim, how)
        for name, ring in rings.items():
            for rank in range(N):
                if rank != victim:
                    failure = ring.result(rank)
                    assert isinstance(failure, Failure)
                    assert (failure.kind, failure.rank) == ("PeerLostError", victim), (name, failure)


@pytest.mark.parametrize("name", EVERY)
def test_every_collective_names_a_late_peer_and_a_new_ring_follows(name: str) -> None:
    """Rank 2 does not come; each that waits for it says so, or hears it from who does."""
    with thread_ring(N, timeout_s=0.3) as rings:

        def work(ring: Ring) -> None:
            if ring.rank != 2:
                for_ever(ring, name)
            ended = time.monotonic() + 90.0
            while time.monotonic() < ended:
                time.sleep(0.02)
                ring.check()

        outcomes = attempt(*(lambda ring=ring: work(ring) for ring in rings))
    if name not in ("broadcast", "broadcast_bytes", "scatter"):  # whose root may run ahead of all others
        assert {type(outcome).__name__ for outcome in outcomes} == {"CollectiveTimeoutError"}, outcomes
        assert {outcome.rank for outcome in outcomes} == {2}
    else:
        assert all(type(outcome).__name__ == "CollectiveTimeoutError" for outcome in outcomes), outcomes
    with thread_ring(N) as rings:
        assert each(rings, lambda ring: ring.all_reduce(torch.ones(1)).item()) == [N] * N


def many(ring: Ring, count: int, seed: int) -> None:
    """Collectives of random kinds and sizes, the same on every rank, each checked."""
    dice = random.Random(seed)
    n, rank = ring.world_size, ring.rank
    pair = ring.group([rank - rank % 2, rank - rank % 2 + 1])
    for _ in range(count):
        kind = dice.randrange(10)
        length = int(10 ** dice.uniform(0, 4.3)) - 1
        root = dice.randrange(n)
        mine = torch.full((length,), float(rank))
        if kind < 3:
            assert ring.all_reduce(mine).eq(n * (n - 1) / 2).all()
        elif kind == 3:
            assert ring.broadcast(mine, root).eq(root).all()
        elif kind == 4:
            assert all(piece.eq(peer).all() for peer, piece in enumerate(ring.all_gather(mine)))
        elif kind == 5:
            found = ring.gather_bytes(bytes([rank]) * length, root)
            assert found is None or found == [bytes([peer]) * length for peer in range(n)]
        elif kind == 6:
            assert ring.reduce_scatter([mine] * n, "max").eq(n - 1).all()
        elif kind == 7:
            assert all(p.eq(peer).all() for peer, p in enumerate(ring.all_to_all([mine] * n)))
        elif kind == 8:
            handle = ring.submit(pair.all_reduce, mine)
            ring.send(torch.tensor([rank]), (rank + 1) % n, tag=length)
            letter = torch.tensor([-1])
            assert ring.recv(letter, None if n == 2 else (rank - 1) % n, tag=length) == letter.item()
            assert handle.wait(90.0).eq(2 * (rank - rank % 2) + 1).all()
        else:
            ring.barrier()


def footprint() -> tuple[int, int, int]:
    """Resident KiB, threads and descriptors of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024, threading.active_count(), len(os.listdir("/proc/self/fd"))


def endure(ring: Ring, count: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    many(ring, 2000, 1)
    before = footprint()
    many(ring, count, 2)
    return before, footprint()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_collectives_leave_nothing_behind() -> None:
    with ProcessRing(4) as ring:
        for rank in range(4):
            ring.start(rank, endure, 10_000)
        for rank in range(4):
            before, after = ring.result(rank, 110.0)
            assert after[1:] == before[1:]
            assert after[0] - before[0] < 4096, (before, after)
