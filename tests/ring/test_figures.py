"""What a ring knows of its links: bytes in both directions, and the round trip."""

from __future__ import annotations

import time

import pytest
import torch

from ringlm.ring import Heartbeat
from ringlm.ring.wire import HEADER_BYTES
from tests.ring.helpers import thread_ring, together


@pytest.mark.parametrize("nbytes", [4096, 1 << 21])
def test_bytes_are_counted_on_both_sides(nbytes: int) -> None:
    with thread_ring(3) as rings:
        data = bytes(nbytes)
        before = [ring.figures() for ring in rings]
        together(
            lambda: rings[0].broadcast_bytes(data), lambda: rings[1].broadcast_bytes(None),
            lambda: rings[2].broadcast_bytes(None),
        )  # fmt: skip
        after = [ring.figures() for ring in rings]
    (to_first, to_second), (from_root, *_) = after[0], after[1]
    for figures, earlier in zip(after[0], before[0], strict=True):
        assert nbytes + HEADER_BYTES <= figures.sent_bytes - earlier.sent_bytes < nbytes * 1.1 + 4 * HEADER_BYTES
    assert (to_first.rank, to_second.rank, from_root.rank) == (1, 2, 0)
    assert from_root.received_bytes == to_first.sent_bytes
    assert after[2][0].received_bytes == to_second.sent_bytes


def test_small_sums_are_counted() -> None:
    with thread_ring(2) as rings:
        for _ in range(10):
            together(*[lambda ring=ring: ring.all_reduce(torch.ones(6)) for ring in rings])
        first, second = (ring.figures()[0] for ring in rings)
    assert first.sent_bytes == second.received_bytes == first.received_bytes == 10 * (HEADER_BYTES + 24)


def test_round_trips_are_told_by_heartbeats() -> None:
    with thread_ring(2, options={"heartbeat": Heartbeat(interval_s=0.02)}) as rings:
        stop = time.monotonic() + 90
        while any(ring.figures()[0].round_trip_s is None for ring in rings):
            assert time.monotonic() < stop
            time.sleep(0.02)
        for ring in rings:
            trip = ring.figures()[0].round_trip_s
            assert trip is not None
            assert 0.0 < trip < 5.0


def test_rank_0_hears_of_links_between_others() -> None:
    with thread_ring(4, options={"heartbeat": Heartbeat(interval_s=0.02)}) as rings:
        together(*[lambda ring=ring: ring.all_reduce(torch.ones(6)) for ring in rings])
        told = [
            (ring.rank, *figures[:3]) for ring in rings[1:] for figures in ring.figures() if figures.rank > ring.rank
        ]
        assert [figures[:2] for figures in told] == [(1, 2), (1, 3), (2, 3)]
        stop = time.monotonic() + 90
        while rings[0].others() != told:
            assert time.monotonic() < stop
            time.sleep(0.02)
