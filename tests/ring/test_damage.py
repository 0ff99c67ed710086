"""A link that damages what it carries: an error that names it, never a wrong sum."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from ringlm.errors import DesyncError, PeerLostError
from ringlm.ring import Ring
from ringlm.ring.algorithms import Limits
from ringlm.ring.link import Link
from ringlm.ring.seal import Connection, Keys, Seal
from ringlm.ring.sockets import tune
from tests.cables import Cables
from tests.ring.helpers import attempt, each, thread_ring, together

CALLS: dict[str, Callable[[Ring], Any]] = {
    "a small sum": lambda ring: ring.all_reduce(torch.ones(6)),
    "a large sum": lambda ring: ring.all_reduce(torch.ones(3000)),
    "a gather": lambda ring: ring.all_gather(torch.ones(50)),
    "bytes": lambda ring: ring.gather_bytes(b"x" * 100, root=1),
}


@pytest.fixture(scope="module")
def cables() -> Iterator[Cables]:
    with Cables() as carried:
        yield carried


def through_a_bad_cable(cables: Cables, ring: Ring, bad_byte: int | None) -> None:
    """What `ring` receives from rank 0 comes with a bit of byte `bad_byte` inverted."""
    link = ring._links[0]
    link.sock = cables.shim(link.sock, flip=None if bad_byte is None else 8 * bad_byte + 2)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_flipped_bit_is_found(cables: Cables, call: str, world_size: int) -> None:
    dice = random.Random(call)

    def with_a_bad(byte: int) -> None:
        with thread_ring(world_size, options={"segment_bytes": 64, "direct_bytes": 32}) as rings:
            through_a_bad_cable(cables, rings[1], byte)

            def work(ring: Ring) -> None:
                for _ in range(20):
                    CALLS[call](ring)
                    ring.barrier()

            outcomes = attempt(*(lambda ring=ring: work(ring) for ring in rings))
        for rank, outcome in enumerate(outcomes):
            assert isinstance(outcome, PeerLostError), outcomes
            assert not isinstance(outcome, DesyncError)
            assert outcome.rank == 0
            assert "its link damages what it carries; the checksum of a frame was wrong" in str(outcome), rank

    together(*(partial(with_a_bad, byte) for byte in (0, 20, 39, 40 + dice.randrange(24))))


def test_a_good_cable_is_not_accused(cables: Cables) -> None:
    with thread_ring(2, options={"segment_bytes": 64, "direct_bytes": 32}) as rings:
        through_a_bad_cable(cables, rings[1], None)
        assert each(rings, lambda ring: ring.all_reduce(torch.ones(3000)).sum().item()) == [6000.0] * 2


# -- any bit at all ----------------------------------------------------------------------------


def conversation(ring: Ring) -> None:
    """Sums small and large, and bytes; only right ones come back."""
    for length in (3, 3, 500, 3):
        assert ring.all_reduce(torch.full((length,), 1.0 + ring.rank)).eq(3.0).all()
    assert ring.broadcast_bytes(b"step" * 20 if ring.rank == 0 else None) == b"step" * 20
    ring.barrier()


def over(cables: Cables, bit: int | None, mode: str) -> tuple[list[Any], int]:
    """How a conversation ends on both ranks where that bit is inverted on the way, and the bytes that went there."""
    (first, near), (second, far) = socket.socketpair(), socket.socketpair()
    cable, keys = cables.join(near, far, there=bit), (bytes(32), b"1" * 32)
    rings = []
    for rank, sock in enumerate((first, second)):
        tune(sock)
        seal = None if mode == "off" else Seal(Keys(keys[rank], keys[1 - rank], 0, 0), mode == "on")
        link = Link(Connection(sock, seal), 1 - rank, f"rank {1 - rank}")
        rings.append(Ring(rank, 2, [link], timeout_s=5.0, segment_bytes=256, limits=Limits(64, 128)))

    def work(ring: Ring) -> None:
        with ring:
            conversation(ring)

    return attempt(*(lambda ring=ring: work(ring) for ring in rings)), cable.ways[0].passed


def missed(cables: Cables, mode: str, count: int, seed: int = 1) -> list[int]:
    """The bits, of `count` drawn from a conversation, after which rank 1 ended without an error that names rank 0, or
    rank 0 with another than one that names rank 1."""
    outcomes, nbytes = over(cables, None, mode)
    assert outcomes == [None, None]
    dice, found = random.Random(f"{mode} {seed}"), []
    for bit in [dice.randrange(8 * nbytes) for _ in range(count)]:
        first, second = over(cables, bit, mode)[0]
        named = isinstance(second, PeerLostError) and second.rank == 0
        if not named or not (first is None or (isinstance(first, PeerLostError) and first.rank == 1)):
            found.append(bit)
    return found


@pytest.mark.parametrize("mode", ["on", "auth", "off"])
def test_any_bit_of_a_conversation(cables: Cables, mode: str) -> None:
    assert missed(cables, mode, 60) == []
