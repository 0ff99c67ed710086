"""send and recv: tags, any source, letters that come before they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from ringlm.errors import CollectiveTimeoutError, DesyncError, PeerLostError, RingError
from ringlm.ring import Ring
from tests.ring.helpers import attempt, each, thread_ring


@pytest.fixture(scope="module")
def rings() -> Iterator[list[Ring]]:
    with thread_ring(3, options={"segment_bytes": 64, "direct_bytes": 32}) as rings:
        yield rings


def number(value: float, length: int = 3) -> torch.Tensor:
    return torch.full((length,), float(value))


def received(ring: Ring, source: int | None, tag: int, length: int = 3) -> tuple[int, float]:
    tensor = torch.zeros(length)
    sender = ring.recv(tensor, source, tag)
    assert tensor.eq(tensor[0]).all()
    return sender, tensor[0].item()


def test_tags_may_be_asked_for_in_any_order(rings: list[Ring]) -> None:
    def work(ring: Ring) -> list[tuple[int, float]]:
        if ring.rank == 1:
            for tag in (1, 2, 1, 3):
                ring.send(number(10 * tag), 0, tag)
            ring.send(number(11), 0, 1)
        return [received(ring, 1, tag) for tag in (3, 1, 2, 1, 1)] if ring.rank == 0 else []

    assert each(rings, work)[0] == [(1, 30.0), (1, 10.0), (1, 20.0), (1, 10.0), (1, 11.0)]


def test_any_source(rings: list[Ring]) -> None:
    def work(ring: Ring) -> list[tuple[int, float]]:
        if ring.rank != 2:
            ring.send(number(ring.rank, 1000), 2, 7)
            return []
        return sorted(received(ring, None, 7, 1000) for _ in range(2))

    assert each(rings, work)[2] == [(0, 0.0), (1, 1.0)]


@pytest.mark.parametrize("length", [3, 9, 1000, 300_000])
def test_letters_that_come_while_their_receiver_is_in_a_collective(rings: list[Ring], length: int) -> None:
    """They are kept, whether they come whole or in part, before small sums and large ones."""

    def work(ring: Ring) -> bool:
        sums = []
        if ring.rank == 0:
            ring.send(number(5, length), 1)
            ring.send(number(6, length), 1, tag=1)
        sums.append(ring.all_reduce(number(1, 4)))
        sums.append(ring.all_reduce(number(1, 5000)))
        if ring.rank == 1:
            assert received(ring, None, 1, length) == (0, 6.0)
            assert received(ring, 0, 0, length) == (0, 5.0)
        return all(bool(total.eq(3).all()) for total in sums)

    if length < 300_000:
        assert all(each(rings, work))
        return
    # more than the sockets hold: the sender finishes because the receiver takes it in
    assert all(each(rings, work))


def test_two_ranks_that_send_at_once_and_receive_then(rings: list[Ring]) -> None:
    def work(ring: Ring) -> float:
        peer = 1 - ring.rank
        if peer < 0:
            return 0.0
        ring.send(number(ring.rank, 1_500_000), peer)
        return received(ring, peer, 0, 1_500_000)[1]

    assert each(rings, work) == [1.0, 0.0, 0.0]


def test_mistakes_are_refused_before_anything_moves(rings: list[Ring]) -> None:
    for peer in (0, 3, -1):
        with pytest.raises(ValueError, match=f"rank 0 of 3 has no peer of rank {peer}"):
            rings[0].send(number(1), peer)
    with pytest.raises(ValueError, match="tag is -1"):
        rings[0].recv(number(1), 1, tag=-1)


def test_another_size_than_was_sent() -> None:
    with thread_ring(2) as (first, second):
        outcomes = attempt(lambda: (first.send(number(1, 4), 1), first.barrier()), lambda: second.recv(number(1, 5), 0))
        for outcome in outcomes:
            assert isinstance(outcome, DesyncError)
            assert "send of 16 bytes of float32 with tag 0" in str(outcome)


def test_a_collective_instead_of_a_letter() -> None:
    with thread_ring(2) as (first, second):
        outcomes = attempt(lambda: first.all_reduce(number(1)), lambda: second.recv(number(1), 0))
        assert all(isinstance(outcome, DesyncError) for outcome in outcomes), outcomes
        assert "called all_reduce number 1" in str(outcomes[1])


def test_a_letter_that_never_comes() -> None:
    done = threading.Event()
    with thread_ring(2, timeout_s=0.3) as (first, second):
        outcomes = attempt(lambda: first.recv(number(1), 1), lambda: done.wait(0.6))
        assert isinstance(outcomes[0], CollectiveTimeoutError)
        assert outcomes[0].rank == 1
        with pytest.raises(CollectiveTimeoutError):
            second.check()


def test_more_than_may_lie_about_ends_the_ring() -> None:
    with thread_ring(2) as (first, second):
        for link in second._links.values():
            link.mailbox._room = 100

        def sends() -> None:
            first.send(number(1, 50), 1)
            while True:
                first.all_reduce(number(1))

        outcomes = attempt(sends, lambda: second.all_reduce(number(1)))
        assert all(isinstance(outcome, DesyncError) for outcome in outcomes)
        assert "200 bytes were sent that this rank has not asked for" in str(outcomes[1])


def test_a_receive_that_waits_beside_what_follows_it(rings: list[Ring]) -> None:
    """Whether its letter comes while the ring does nothing, within a sum, or before."""

    def work(ring: Ring) -> list[tuple[int, float]]:
        right, left = (ring.rank + 1) % 3, (ring.rank - 1) % 3
        got = [number(0, 500) for _ in range(3)]
        ring.send(number(30 + ring.rank, 500), right, 3)
        ring.barrier()
        handles = [ring.expect(got[0], left, 1), ring.expect(got[1], None, 2), ring.expect(got[2], left, 3)]
        ring.submit(ring.all_reduce, number(1)).wait(90.0)
        with ring.turn:
            ring.all_reduce(number(1))
        assert not handles[0].done()
        for tag in (2, 1):
            ring.send(number(10 * tag + ring.rank, 500), right, tag)
            ring.all_reduce(number(1, 5000))
        return [(handle.wait(90.0), tensor[0].item()) for handle, tensor in zip(handles, got, strict=True)]

    for rank, found in enumerate(each(rings, work)):
        left = (rank - 1) % 3
        assert found == [(left, 10.0 + left), (left, 20.0 + left), (left, 30.0 + left)]


def test_a_receive_that_waits_for_another_size_or_for_nobody() -> None:
    with thread_ring(2) as (first, second):
        handle = first.expect(number(0, 3), 1)
        attempt(lambda: second.send(number(0, 4), 0))
        with pytest.raises(DesyncError, match="this rank awaits a send of 12 bytes"):
            handle.wait(90.0)
    with thread_ring(2) as (first, second):
        handle = first.expect(number(0, 3), 1)
        second.close()
        with pytest.raises(PeerLostError, match="has left the ring in order"):
            handle.wait(90.0)
    with thread_ring(2) as (first, second):
        handle = first.expect(number(0, 3), 1)
        first.close()
        with pytest.raises(RingError, match="closed"):
            handle.wait(90.0)
