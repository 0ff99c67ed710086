"""A link that damages what it carries: an error that names it, never a wrong sum."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringlm.errors import DesyncError, PeerLostError
from ringlm.ring import Ring
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
