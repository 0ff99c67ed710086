"""A link that damages what it carries: an error that names it, never a wrong sum."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringlm.errors import DesyncError, PeerLostError
from ringlm.ring import Ring
from ringlm.ring.algorithms import Limits
from ringlm.ring.link import Link
from ringlm.ring.seal import Connection, Keys, Seal
from ringlm.ring.sockets import tune
from tests.ring.helpers import attempt, each, thread_ring

CALLS: dict[str, Callable[[Ring], Any]] = {
    "a small sum": lambda ring: ring.all_reduce(torch.ones(6)),
    "a large sum": lambda ring: ring.all_reduce(torch.ones(3000)),
    "a gather": lambda ring: ring.all_gather(torch.ones(50)),
    "bytes": lambda ring: ring.gather_bytes(b"x" * 100, root=1),
}


def through_a_bad_cable(ring: Ring, bad_byte: int) -> None:
    """What rank 1 receives from rank 0 comes through a relay that flips a bit of byte `bad_byte`."""
    link = ring._links[0]
    straight, (inner, outer) = link.sock, socket.socketpair()

    def carry(source: socket.socket, target: socket.socket, spoil: bool) -> None:
        passed = 0
        try:
            while True:
                try:
                    data = bytearray(source.recv(1 << 16))
                except BlockingIOError:
                    continue
                if not data:
                    break
                if spoil and passed <= bad_byte < passed + len(data):
                    data[bad_byte - passed] ^= 4
                passed += len(data)
                target.sendall(data)
        except OSError:
            pass
        inner.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=carry, args=(straight, inner, True), daemon=True).start()
    threading.Thread(target=carry, args=(inner, straight, False), daemon=True).start()
    link.sock = outer


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_flipped_bit_is_found(call: str, world_size: int) -> None:
    dice = random.Random(call)
    for bad_byte in (0, 20, 39, 40 + dice.randrange(24)):
        with thread_ring(world_size, options={"segment_bytes": 64, "direct_bytes": 32}, timeout_s=5.0) as rings:
            through_a_bad_cable(rings[1], bad_byte)

            def work(ring: Ring) -> None:
                for _ in range(20):
                    CALLS[call](ring)
                    ring.barrier()

            outcomes = attempt(*(lambda ring=ring: work(ring) for ring in rings))
        for rank, outcome in enumerate(outcomes):
            assert isinstance(outcome, PeerLostError), (bad_byte, outcomes)
            assert not isinstance(outcome, DesyncError)
            assert outcome.rank == 0
            assert "its link damages what it carries; the checksum of a frame was wrong" in str(outcome), rank


def test_a_good_relay_is_not_accused() -> None:
    with thread_ring(2, options={"segment_bytes": 64, "direct_bytes": 32}) as rings:
        through_a_bad_cable(rings[1], 1 << 60)
        assert each(rings, lambda ring: ring.all_reduce(torch.ones(3000)).sum().item()) == [6000.0] * 2


# -- any bit at all ----------------------------------------------------------------------------


class Cable:
    """Two ends of a connection that inverts bit `bit` of what goes from the first to the second."""

    def __init__(self, bit: int) -> None:
        (first, self._near), (second, self._far) = socket.socketpair(), socket.socketpair()
        self.ends = first, second
        self.passed = 0  # bytes from the first to the second
        self._bit = bit
        for source, target in ((self._near, self._far), (self._far, self._near)):
            threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                if source is self._near:
                    at = self._bit // 8 - self.passed
                    if 0 <= at < len(data):
                        data[at] ^= 1 << self._bit % 8
                    self.passed += len(data)
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def conversation(ring: Ring) -> None:
    """Sums small and large, and bytes; only right ones come back."""
    for length in (3, 3, 500, 3):
        assert ring.all_reduce(torch.full((length,), 1.0 + ring.rank)).eq(3.0).all()
    assert ring.broadcast_bytes(b"step" * 20 if ring.rank == 0 else None) == b"step" * 20
    ring.barrier()


def over(bit: int, mode: str) -> tuple[list[Any], int]:
    """How a conversation ends on both ranks where that bit is inverted on the way, and the bytes that went there."""
    cable, keys = Cable(bit), (bytes(32), b"1" * 32)
    rings = []
    for rank, sock in enumerate(cable.ends):
        tune(sock)
        seal = None if mode == "off" else Seal(Keys(keys[rank], keys[1 - rank], 0, 0), mode == "on")
        link = Link(Connection(sock, seal), 1 - rank, f"rank {1 - rank}")
        rings.append(Ring(rank, 2, [link], timeout_s=5.0, segment_bytes=256, limits=Limits(64, 128)))

    def work(ring: Ring) -> None:
        with ring:
            conversation(ring)

    return attempt(*(lambda ring=ring: work(ring) for ring in rings)), cable.passed


def missed(mode: str, count: int, seed: int = 1) -> list[int]:
    """The bits, of `count` drawn from a conversation, after which rank 1 ended without an error that names rank 0, or
    rank 0 with another than one that names rank 1."""
    outcomes, nbytes = over(1 << 60, mode)
    assert outcomes == [None, None]
    dice, found = random.Random(f"{mode} {seed}"), []
    for bit in [dice.randrange(8 * nbytes) for _ in range(count)]:
        first, second = over(bit, mode)[0]
        named = isinstance(second, PeerLostError) and second.rank == 0
        if not named or not (first is None or (isinstance(first, PeerLostError) and first.rank == 1)):
            found.append(bit)
    return found


@pytest.mark.parametrize("mode", ["on", "auth", "off"])
def test_any_bit_of_a_conversation(mode: str) -> None:
    assert missed(mode, 60) == []
