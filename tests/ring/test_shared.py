"""Memory shared by ranks of one machine: what goes round its slots, who wakes whom, and which memory is refused."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ringlm.errors import PeerLostError
from ringlm.ring import Ring, shared
from ringlm.ring.shared import Area, accept, area_bytes, offer, slots
from tests.processes import Failure
from tests.ring.helpers import ProcessRing, attempt, each, thread_ring

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memory that can be passed on sealed")

SLOT_BYTES = 1 << 19
TINY = {"segment_bytes": 64, "direct_bytes": 32}


@pytest.fixture
def ends() -> Iterator[tuple[Area, Area]]:
    """Both ends of an area, of two slots a direction."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        first = offer(ours, SLOT_BYTES)
        second = accept(theirs, SLOT_BYTES)
        assert ours.recv(1) == b"\1"
    assert first is not None
    assert second is not None
    yield first, second
    first.close()
    second.close()


def taken(area: Area, nbytes: int) -> bytes:
    body = bytearray(nbytes)
    area.take(memoryview(body))
    return bytes(body)


def readable(area: Area) -> bool:
    return bool(select.select([area.credits], [], [], 0)[0])


def test_bodies_of_any_size_go_round_both_ways(ends: tuple[Area, Area]) -> None:
    dice = random.Random(1)
    for _ in range(25):
        for source, target in (ends, ends[::-1]):
            bodies = [dice.randbytes(dice.choice([1, 63, 64, SLOT_BYTES])) for _ in range(slots(SLOT_BYTES))]
            assert all(source.put(memoryview(body)) for body in bodies)
            assert [taken(target, len(body)) for body in bodies] == bodies


def test_a_full_area_takes_no_more_until_a_slot_is_emptied(ends: tuple[Area, Area]) -> None:
    first, second = ends
    for number in range(slots(SLOT_BYTES)):
        assert first.put(memoryview(bytes([number]) * 8))
    assert not first.put(memoryview(b"more"))
    assert first.full
    assert not readable(first)
    assert taken(second, 8) == bytes(8)
    assert readable(first)
    assert first.put(memoryview(b"more"))
    assert not first.full
    assert [taken(second, 8), taken(second, 4)] == [b"\1" * 8, b"more"]


@pytest.mark.parametrize("how", ["closed", "shut"])
def test_a_full_area_tells_that_the_peer_is_gone(how: str, ends: tuple[Area, Area]) -> None:
    first, second = ends
    while first.put(memoryview(b"x")):
        pass
    second.close() if how == "closed" else first.shut()
    assert readable(first)
    with pytest.raises(ConnectionResetError):
        first.put(memoryview(b"x"))


def test_what_was_put_can_be_taken_when_the_peer_has_left(ends: tuple[Area, Area]) -> None:
    first, second = ends
    first.put(memoryview(b"last"))
    first.close()
    assert taken(second, 4) == b"last"


def fine(count: int) -> list[int]:
    memory, mapped = shared._sealed_memory(area_bytes(SLOT_BYTES))
    mapped.close()
    ours, theirs = socket.socketpair()
    ours.close()
    return [memory, theirs.detach()][:count]


def memory(nbytes: int, seals: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, nbytes)
    if seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def file(nbytes: int) -> int:
    with tempfile.TemporaryFile() as opened:
        opened.truncate(nbytes)
        return os.dup(opened.fileno())


WHOLE, SHRINK, GROW = area_bytes(SLOT_BYTES), getattr(fcntl, "F_SEAL_SHRINK", 0), getattr(fcntl, "F_SEAL_GROW", 0)
HOSTILE: dict[str, Callable[[], list[int]]] = {
    "unsealed": lambda: [memory(WHOLE, 0), *fine(2)[1:]],
    "may shrink": lambda: [memory(WHOLE, GROW), *fine(2)[1:]],
    "too small": lambda: [memory(WHOLE - 4096, SHRINK | GROW), *fine(2)[1:]],
    "empty": lambda: [memory(0, SHRINK | GROW), *fine(2)[1:]],
    "read only": lambda: [memory(WHOLE, SHRINK | GROW | fcntl.F_SEAL_WRITE), *fine(2)[1:]],
    "a file": lambda: [file(WHOLE), *fine(2)[1:]],
    "two pieces of memory": lambda: [*fine(1), *fine(1)],
    "one descriptor": lambda: fine(1),
    "three descriptors": lambda: [memory(WHOLE, 0), *fine(2)],
    "none": list,
}


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("what", HOSTILE)
def test_other_memory_than_agreed_is_refused(what: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        passed = HOSTILE[what]()
        if passed:
            socket.send_fds(ours, [b"\1"], passed)
        else:
            ours.send(b"\1")
        for descriptor in passed:
            os.close(descriptor)
        before = descriptors()
        assert accept(theirs, SLOT_BYTES) is None
        assert ours.recv(1) == b"\0"
        assert descriptors() == before


# -- in a ring ---------------------------------------------------------------------------------


def sums(ring: Ring) -> list[bool]:
    """Sums of one frame and of many, each checked; the links that share memory."""
    for length in (3, 30, 1000, 3001):
        ours = torch.arange(length) * (ring.rank + 1)
        expected = torch.arange(length) * (ring.world_size * (ring.world_size + 1) // 2)
        assert ring.all_reduce(ours).equal(expected)
    return [link.area is not None for link in ring._links.values()]


def test_ranks_of_one_machine_share_memory() -> None:
    with thread_ring(3, options=TINY) as rings:
        assert each(rings, sums) == [[True, True]] * 3


def test_sealed_links_share_none() -> None:
    with thread_ring(3, options=TINY, secret=b"s", seal="on") as rings:
        assert each(rings, sums) == [[False, False]] * 3


@pytest.mark.parametrize("who", ["offers", "accepts"])
def test_the_socket_serves_where_there_is_no_such_memory(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if who == "offers":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(shared, "_is_sealed", lambda *_: False)
    with thread_ring(3, options=TINY) as rings:
        assert each(rings, sums) == [[False, False]] * 3


def test_a_large_letter_may_come_before_its_time() -> None:
    def work(ring: Ring) -> bool:
        if ring.rank == 0:
            ring.send(torch.arange(500), 1, tag=7)
        found = torch.zeros(500, dtype=torch.int64)
        right = all(sums(ring))
        if ring.rank == 1:
            ring.recv(found, 0, tag=7)
            return right and found.equal(torch.arange(500))
        return right

    with thread_ring(2, options=TINY) as rings:
        assert each(rings, work) == [True, True]


def test_a_flipped_bit_in_the_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with thread_ring(2, options=TINY, timeout_s=5.0) as rings:
        area, put = rings[0]._links[1].area, Area.put

        def spoil(self: Area, body: memoryview) -> bool:
            changed = bytearray(body)
            if self is area:
                changed[9] ^= 4
            return put(self, memoryview(changed))

        monkeypatch.setattr(Area, "put", spoil)
        outcomes = attempt(*(lambda ring=ring: ring.all_reduce(torch.ones(3000)) for ring in rings))
    for outcome in outcomes:
        assert isinstance(outcome, PeerLostError)
        assert outcome.rank == 0
        assert "its link damages what it carries" in str(outcome)


def broadcast_much(ring: Ring) -> None:
    ring.broadcast(torch.zeros(1 << 21))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_is_lost_behind_a_full_area_is_named(number: signal.Signals) -> None:
    with ProcessRing(2, heartbeat=(0.1, 3.0, 60.0)) as ring:
        ring.start(0, broadcast_much)  # rank 1 is in no call, and takes nothing
        time.sleep(0.3)
        ring.signal(1, number)
        failure: Any = ring.result(0)
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.rank) == ("PeerLostError", 1)


def test_nothing_stays_open() -> None:
    before = descriptors()
    for _ in range(3):
        with thread_ring(3, options=TINY) as rings:
            each(rings, sums)
    del rings
    assert descriptors() == before
