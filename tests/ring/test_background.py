"""Collectives in the background, and groups of ranks."""

from __future__ import annotations

import threading

import pytest
import torch

from ringlm.errors import PeerLostError, RingError
from ringlm.ring import Ring
from tests.ring.helpers import attempt, each, thread_ring


def test_they_are_made_in_order_and_before_what_follows() -> None:
    with thread_ring(3) as rings:

        def work(ring: Ring) -> list[float]:
            running = torch.ones(1)
            first = ring.submit(ring.all_reduce, running)
            second = ring.submit(ring.all_reduce, running, reduction="sum")
            third = ring.submit(ring.gather_bytes, bytes([ring.rank]))
            ring.all_reduce(torch.ones(5))  # directly: after the three
            assert first.done()
            assert third.done()
            assert second.wait() is running
            gathered = third.wait(90.0)
            assert gathered == ([b"\0", b"\1", b"\2"] if ring.rank == 0 else None)
            return running.tolist()

        assert each(rings, work) == [[9.0]] * 3


def test_a_wait_that_takes_too_long_changes_nothing() -> None:
    with thread_ring(2) as (first, second):
        handle = first.submit(first.all_reduce, torch.ones(2))
        with pytest.raises(TimeoutError, match=r"not done after 0\.05 s"):
            handle.wait(0.05)
        assert not handle.done()
        second.all_reduce(torch.ones(2))
        assert handle.wait(90.0).tolist() == [2.0, 2.0]


def test_a_failure_is_raised_by_all_that_wait() -> None:
    with thread_ring(2) as (first, second):
        handles = [first.submit(first.all_reduce, torch.ones(2)) for _ in range(3)]
        second.abort("out of memory")
        for handle in handles:
            with pytest.raises(PeerLostError, match="rank 1 failed: out of memory"):
                handle.wait(90.0)
        with pytest.raises(PeerLostError):
            first.submit(first.barrier)


def test_a_mistake_is_raised_where_it_is_waited_for() -> None:
    with thread_ring(2) as (first, second):
        with pytest.raises(ValueError, match="root is 5"):
            first.submit(first.broadcast, torch.ones(1), 5).wait(90.0)
        assert each([first, second], lambda ring: ring.all_reduce(torch.ones(1)).item()) == [2.0, 2.0]


def test_closing_makes_what_was_submitted_and_ends_the_thread() -> None:
    before = threading.active_count()
    with thread_ring(2) as rings:
        each(rings, lambda ring: ring.submit(ring.barrier).wait(90.0))
        handles = [ring.submit(ring.all_reduce, torch.ones(1)) for ring in rings]
        attempt(*(ring.close for ring in rings))
        assert [handle.wait(90.0).item() for handle in handles] == [2.0, 2.0]
        with pytest.raises(RingError, match="closed"):
            rings[0].submit(rings[0].barrier)
    assert threading.active_count() == before


def test_groups_side_by_side() -> None:
    with thread_ring(4) as rings:

        def work(ring: Ring) -> tuple[float, float, float]:
            half = ring.group([0, 1] if ring.rank < 2 else [3, 2])
            ends = ring.group(range(4))
            alone = ring.group([ring.rank])
            assert (half.rank, half.world_size) == (ring.rank % 2, 2)
            total = torch.tensor([float(ring.rank)])
            for _ in range(ring.rank // 2 + 1):  # groups count for themselves
                half.barrier()
            half.all_reduce(total)
            return total.item(), alone.all_reduce(torch.ones(1)).item(), ends.all_reduce(torch.ones(1)).item()

        assert each(rings, work) == [(1.0, 1.0, 4.0), (1.0, 1.0, 4.0), (5.0, 1.0, 4.0), (5.0, 1.0, 4.0)]
        with pytest.raises(ValueError, match=r"rank 0 of 4 can make no group of ranks \[1, 2\]"):
            rings[0].group([1, 2])
        with pytest.raises(ValueError, match="can make no group"):
            rings[0].group([0, 4])
