"""Who gets which share of the next ring, and when a ring may grow."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ringlm.cluster.agreement import Capabilities
from ringlm.cluster.gathering import seats
from ringlm.cluster.growth import PAUSE_S, Growth
from ringlm.cluster.joining import Member
from ringlm.cluster.loading import Loader
from ringlm.cluster.local import local_ring
from ringlm.cluster.memory import Memory
from ringlm.cluster.seating import Seating
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.errors import PeerLostError
from ringlm.ring import Heartbeat, Ring
from ringlm.ring.handshake import Place
from tests.ring.helpers import together

WHOLE = [0, 1, 2, 3]


def member(rank: int, epoch: int = 1, port: int = 1) -> Member:
    capabilities = Capabilities(rank, "cpu", ["float32"], Settings(), Memory("here", 1 << 30))
    return Member(rank, epoch, Place(["127.0.0.1"], port, "here"), capabilities)


def test_who_had_a_rank_has_it_again_and_spares_take_what_is_left() -> None:
    first, second, third, spare = member(1), member(2), member(3), member(-1)
    assert list(seats([third, first, second], WHOLE, 1, 4).items()) == [(1, first), (2, second), (3, third)]
    assert seats([spare, third, first], WHOLE, 1, 4) == {1: first, 2: spare, 3: third}
    assert seats([spare, member(-1, port=2), first], WHOLE[:3], 1, 3) == {1: first, 2: spare}


def test_two_that_had_one_rank() -> None:
    """One was started again while the other was believed lost: the first to come keeps it."""
    one, other = member(1, port=1), member(1, port=2)
    assert seats([one, other], [0, 1, 2], 1, 3) == {1: one, 2: other}
    assert seats([other, one], [0, 1], 1, 2) == {1: other}


def test_a_share_goes_with_its_rank_and_is_inherited() -> None:
    """Four ranks; rank 2 is lost, so that rank 3 becomes rank 2; later it is started again, or its place is taken."""
    first, third = member(1), member(3)
    assert list(seats([third, first], WHOLE, 1, 4)) == [1, 3]
    slots = [0, 1, 3]
    first, third = member(1, epoch=2), member(2, epoch=2)
    for newcomer in (member(2, epoch=0), member(-1, epoch=0)):
        assert seats([newcomer, first, third], slots, 2, 4) == {1: first, 2: newcomer, 3: third}


def test_a_ring_grows_ever_more_rarely_where_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    growth, pauses = Growth(), []
    for _ in range(8):
        assert growth.due
        growth.tried(begins=True)
        assert growth.ended(broken=False)  # in order, for the larger ring
        growth.formed()
        since, now = now, now + 5.0
        assert growth.ended(broken=True)  # who was taken in is lost
        assert not growth.under_way
        growth.formed()
        while not growth.due:
            now += 1.0
        pauses.append(now - since)
    assert pauses == [PAUSE_S * min(2**count, 32) for count in range(8)]
    growth.tried(begins=True)
    assert growth.ended(broken=False)
    growth.formed()
    now += 100.0
    assert not growth.ended(broken=True)  # after a ring that has held it is a loss like any other
    now += PAUSE_S * 32
    growth.tried(begins=False)
    now += PAUSE_S
    assert growth.due


def test_a_ring_that_ends_before_all_have_loaded_is_formed_again(tiny_llama: Path) -> None:
    """With the ranks that it had, and with one that was started again."""
    specs = [EngineSpec(model=str(tiny_llama), ring=ring, rejoin_timeout_s=20.0) for ring in local_ring(2)]
    lost = PeerLostError("rank 1 is lost.", 1)
    with Seating(Loader(specs[0]), print) as first:
        with Seating(Loader(specs[1]), print) as second:
            assert epochs(lambda: first.first(Heartbeat()), lambda: second.first(Heartbeat())) == [0, 0]
            assert epochs(lambda: first.next(lost), lambda: second.next(lost)) == [1, 1]
        with Seating(Loader(specs[1]), print) as again:
            assert epochs(lambda: first.next(lost), lambda: again.first(Heartbeat())) == [2, 2]


def epochs(*ways: Callable[[], Ring | None]) -> list[int]:
    """Those of the ranks' rings, which end then."""
    rings = together(*ways)
    for ring in rings:
        ring.close()
    return [ring.epoch for ring in rings]
