"""Ranks that call different collectives: a DesyncError on every rank, never a wrong sum, never a hang."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringlm.errors import CollectiveTimeoutError, DesyncError
from ringlm.ring import Heartbeat, Ring
from tests.ring.helpers import attempt, thread_ring

Call = Callable[[Ring], Any]


def sums(length: int, dtype: torch.dtype = torch.float32) -> Call:
    return lambda ring: ring.all_reduce(torch.ones(length, dtype=dtype))


def broadcast(root: int) -> Call:
    return lambda ring: ring.broadcast(torch.ones(4), root)


def gather(rows: int, root: int = 0) -> Call:
    return lambda ring: ring.gather(torch.ones(rows, 2), root)


def gather_bytes(root: int = 0) -> Call:
    return lambda ring: ring.gather_bytes(b"x" * 8, root)


PAIRS: dict[str, tuple[Call, Call]] = {
    "one element less": (sums(4), sums(3)),
    "nothing": (sums(4), sums(0)),
    "direct and segmented": (sums(4), sums(500)),
    "segmented, one element more": (sums(500), sums(501)),
    "dtype of the same size": (sums(4, torch.float32), sums(4, torch.int32)),
    "dtype of half the size": (sums(4, torch.float32), sums(8, torch.bfloat16)),
    "sum and broadcast": (sums(4), broadcast(1)),
    "sum and gather": (gather(4), sums(8)),
    "gather and gather_bytes": (gather(1), gather_bytes()),
    "rows that do not fit": (gather(3), gather(4)),
    "roots": (broadcast(0), broadcast(1)),
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", [*PAIRS, *(f"{name}, swapped" for name in PAIRS if name != "roots")])
def test_every_rank_learns_it(name: str, world_size: int) -> None:
    """Rank 1 is the odd one out. The first call may need no answer, but then the next ones tell."""
    one, other = PAIRS[name.removesuffix(", swapped")]
    if name.endswith(", swapped"):
        one, other = other, one

    def work(ring: Ring) -> None:
        (other if ring.rank == 1 else one)(ring)
        ring.gather_bytes(b"the end")
        ring.broadcast_bytes(b"of it" if ring.rank == 0 else None)

    with thread_ring(world_size, options={"segment_bytes": 64, "direct_bytes": 32}) as rings:
        outcomes = attempt(*(lambda ring=ring: work(ring) for ring in rings))
        for ring, outcome in zip(rings, outcomes, strict=True):
            assert isinstance(outcome, DesyncError), outcomes
            assert outcome.rank != ring.rank or world_size > 2
            assert " called " in str(outcome)
            with pytest.raises(DesyncError):  # and from now on
                ring.all_reduce(torch.ones(1))
            with pytest.raises(DesyncError):
                ring.check()


def test_the_message_says_who_called_what() -> None:
    with thread_ring(2) as (first, second):
        outcomes = attempt(lambda: sums(4)(first), lambda: sums(3, torch.bfloat16)(second))
    for outcome, rank in zip(outcomes, (0, 1), strict=True):
        assert isinstance(outcome, DesyncError)
        assert outcome.rank == 1 - rank
        assert "all_reduce number 1 of 16 bytes of float32 (epoch 0, root 0)" in str(outcome)
        assert "all_reduce number 1 of 6 bytes of bfloat16 (epoch 0, root 0)" in str(outcome)
        assert str(outcome).endswith("All ranks must call the same collectives in the same order.")


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_wait_for_each_other_in_different_collectives(world_size: int) -> None:
    """Each awaits the other's bytes and no byte is on its way: only the heartbeats can tell."""
    heartbeat = Heartbeat(interval_s=0.05, stall_s=0.3)
    with thread_ring(world_size, options={"heartbeat": heartbeat}) as rings:
        # Rank 0 awaits everybody's bytes; the others await rank 0's.
        calls = [lambda: rings[0].gather_bytes(b""), *(lambda r=r: r.broadcast_bytes(None) for r in rings[1:])]
        outcomes = attempt(*calls)
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, DesyncError), outcomes
        assert "rank 0 called gather_bytes number 1" in str(outcome)
        assert "called broadcast_bytes number 1" in str(outcome)
        assert outcome.rank == (1 if rank != 1 else 0)


def test_without_heartbeats_they_run_into_the_timeout() -> None:
    with thread_ring(2, timeout_s=0.3) as (first, second):
        outcomes = attempt(lambda: first.gather_bytes(b""), lambda: second.broadcast_bytes(None))
    assert all(isinstance(outcome, CollectiveTimeoutError) for outcome in outcomes), outcomes


def test_a_slow_rank_is_no_mismatch() -> None:
    """Everybody in the same collective, or one of them computing: the heartbeats leave them alone."""
    heartbeat = Heartbeat(interval_s=0.02, stall_s=0.1)
    with thread_ring(2, options={"heartbeat": heartbeat}) as (first, second):

        def late() -> bytes:
            time.sleep(0.6)
            return second.broadcast_bytes(b"at last", root=1)

        assert attempt(lambda: first.broadcast_bytes(None, root=1), late) == [b"at last"] * 2
