"""broadcast, gather and their kin; what a ring refuses on its own; and that closing one leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringlm.errors import RingError
from ringlm.ring import Ring, wire
from tests.ring.helpers import attempt, contribution, each, thread_ring


@pytest.fixture(scope="module", params=[1, 2, 3, 5])
def rings(request: pytest.FixtureRequest) -> Iterator[list[Ring]]:
    with thread_ring(request.param, options={"segment_bytes": 64, "direct_bytes": 32}) as rings:
        yield rings


SHARED = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED
@given(data=st.data())
def test_broadcast(rings: list[Ring], data: st.DataObject) -> None:
    root = data.draw(st.integers(0, len(rings) - 1))
    length = data.draw(st.sampled_from([0, 1, 15, 16, 17, 1000]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    step = data.draw(st.sampled_from([1, 2]))

    def work(ring: Ring) -> torch.Tensor:
        tensor = contribution(7, ring.rank, 2 * length, dtype)[::step]
        assert ring.broadcast(tensor, root) is tensor
        return tensor

    expected = contribution(7, root, 2 * length, dtype)[::step]
    assert all(torch.equal(result, expected) for result in each(rings, work))


@SHARED
@given(data=st.data())
def test_gather_of_uneven_columns(rings: list[Ring], data: st.DataObject) -> None:
    root = data.draw(st.integers(0, len(rings) - 1))
    rows = data.draw(st.integers(0, 5))
    columns = [data.draw(st.sampled_from([0, 1, 3, 40])) for _ in rings]
    transposed = data.draw(st.booleans())

    def mine(rank: int) -> torch.Tensor:
        flat = contribution(3, rank, rows * columns[rank], torch.float32)
        return flat.view(columns[rank], rows).t() if transposed else flat.view(rows, columns[rank])

    results = each(rings, lambda ring: ring.gather(mine(ring.rank), root))
    assert [result is None for result in results] == [rank != root for rank in range(len(rings))]
    for rank, piece in enumerate(results[root]):
        assert piece.shape == (rows, columns[rank]) or rows == 0
        assert torch.equal(piece.reshape(-1), mine(rank).reshape(-1))


@SHARED
@given(data=st.data())
def test_bytes_of_any_length(rings: list[Ring], data: st.DataObject) -> None:
    root = data.draw(st.integers(0, len(rings) - 1))
    sizes = [data.draw(st.sampled_from([0, 1, 23, 24, 25, 5000])) for _ in rings]
    messages = [bytes([rank]) * size for rank, size in enumerate(sizes)]

    def work(ring: Ring) -> tuple[bytes, list[bytes] | None]:
        heard = ring.broadcast_bytes(messages[root] if ring.rank == root else None, root)
        return heard, ring.gather_bytes(messages[ring.rank], root)

    for rank, (heard, gathered) in enumerate(each(rings, work)):
        assert heard == messages[root]
        assert gathered == (messages if rank == root else None)


def test_megabytes(rings: list[Ring]) -> None:
    message = bytes(range(256)) * 8_000

    def work(ring: Ring) -> bool:
        heard = ring.broadcast_bytes(message if ring.rank == 0 else None)
        gathered = ring.gather_bytes(message[ring.rank :])
        return heard == message and (gathered is None or gathered == [message[r:] for r in range(ring.world_size)])

    assert all(each(rings, work))


def test_mistakes_of_the_caller_are_refused_before_anything_moves(
    rings: list[Ring], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(ring: Ring) -> float:
        n = ring.world_size
        with pytest.raises(ValueError, match="the root of a broadcast has to give its bytes"):
            ring.broadcast_bytes(None, root=ring.rank)
        if n > 1:
            with pytest.raises(ValueError, match=f"root is {n}; the ranks are 0 to {n - 1}"):
                ring.broadcast(torch.ones(1), root=n)
            with pytest.raises(ValueError, match="300 bytes in one message; at most 200 are carried"):
                ring.gather_bytes(bytes(300))
        return ring.all_reduce(torch.ones(1)).item()

    monkeypatch.setattr("ringlm.ring.moving.MAX_MESSAGE_BYTES", 200)
    assert each(rings, work) == [len(rings)] * len(rings)


def test_a_message_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 200)  # what the receiver allows; the sender's is a copy
    with thread_ring(2) as (first, second):
        outcomes = attempt(lambda: first.broadcast_bytes(bytes(300)), lambda: second.broadcast_bytes(None))
    assert outcomes[0] == bytes(300)
    assert "broadcast_bytes number 1 of 300 bytes" in str(outcomes[1])


def test_what_a_ring_counts() -> None:
    with thread_ring(2) as rings:
        each(rings, lambda ring: [ring.all_reduce(torch.ones(10)) for _ in range(3)])
        for ring in rings:
            assert (ring.sequence, ring.waiting, ring.here, ring.epoch) == (3, False, (0, 1), 0)
            assert 0 < ring.seconds < 5
            ring.check()


def test_a_closed_ring_says_so() -> None:
    with thread_ring(2) as rings:
        for ring in rings:
            ring.close()
            ring.close()
            for call in (ring.check, lambda ring=ring: ring.all_reduce(torch.ones(1))):
                with pytest.raises(RingError, match=r"^the ring is closed\.$"):
                    call()


def test_one_rank_may_close_while_the_last_bytes_are_on_their_way() -> None:
    for _ in range(5):
        with thread_ring(3) as rings:

            def work(ring: Ring) -> list[bytes] | None:
                gathered = ring.gather_bytes(bytes(200_000))
                ring.close()
                return gathered

            assert each(rings, work) == [[bytes(200_000)] * 3, None, None]


def test_twenty_rings_leave_no_thread_and_no_descriptor() -> None:
    def count() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here")
    with thread_ring(3, secret=b"x"):  # imports, and whatever else happens once
        pass
    before = count()
    for turn in range(20):
        with thread_ring(2 + turn % 2, secret=b"x" if turn % 3 else None) as rings:
            each(rings, lambda ring: ring.all_reduce(torch.ones(100)))
    assert count() == before
