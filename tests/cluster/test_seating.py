"""Who gets which rank of the next ring, and whose share of the model."""

from __future__ import annotations

from ringlm.cluster.agreement import Capabilities
from ringlm.cluster.joining import Member
from ringlm.cluster.memory import Memory
from ringlm.cluster.seating import seats, slots_of
from ringlm.cluster.settings import Settings
from ringlm.ring.handshake import Place


def member(rank: int, port: int = 1) -> Member:
    capabilities = Capabilities(rank, "cpu", ["float32"], Settings(), Memory("here", 1 << 30))
    return Member(rank, 1, Place(["127.0.0.1"], port, "here"), capabilities)


def test_who_had_a_rank_has_it_again_and_spares_take_what_is_left() -> None:
    first, second, third, spare = member(1), member(2), member(3), member(-1)
    assert seats([third, first, second], 4) == [first, second, third]
    assert seats([spare, third, first], 4) == [first, spare, third]
    assert seats([spare, member(-1, 2), first], 3) == [first, spare]


def test_two_that_had_one_rank() -> None:
    """One was started again while the other was believed lost: the first to come keeps it."""
    one, other = member(1, 1), member(1, 2)
    assert seats([one, other], 3) == [one, other]
    assert seats([other, one], 2) == [other]


def test_a_share_goes_with_its_rank_and_is_inherited() -> None:
    """Four ranks; rank 2 is lost, and later its place is taken."""
    assert slots_of([member(1), member(3)], [0, 1, 2, 3], 4) == [0, 1, 3]
    assert slots_of([member(1), member(2), member(-1)], [0, 1, 3], 4) == [0, 1, 3, 2]
    assert slots_of([member(1), member(-1), member(3)], [0, 1, 2, 3], 4) == [0, 1, 2, 3]
