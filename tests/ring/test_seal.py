"""Sealed links: which are, what goes over them, and that nothing else is taken for it."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import msgspec
import pytest
import torch

from ringlm.errors import ConfigError, PeerLostError
from ringlm.ring import Heartbeat, Ring, RingConfig
from ringlm.ring.control import ControlPlane
from ringlm.ring.handshake import Agreed, RefusedError, Terms, initiate, respond
from ringlm.ring.peer import Abort, Beat
from ringlm.ring.seal import TAG_BYTES, Connection, Keys, Mode, Seal, pack, unpack
from tests.ring.helpers import configs, contribution, each, expected_sum, thread_ring
from tests.ring.test_handshake import HELLO, Side, accept, converse

SECRET = b"secret"
SEALED: list[Mode] = ["on", "auth"]


def pair(mode: Mode) -> tuple[Seal, Seal]:
    one, other = b"1" * 32, b"2" * 32
    return Seal(Keys(one, other, 1, 0), mode == "on"), Seal(Keys(other, one, 0, 1), mode == "on")


@pytest.mark.parametrize("mode", SEALED)
def test_what_is_sealed_is_opened_in_its_order_alone(mode: Mode) -> None:
    ours, theirs = pair(mode)
    messages = [(b"head", bytes(range(size))) for size in (0, 1, 200, 200)]
    sealed = [pack(head, body, ours) for head, body in messages]
    for (head, body), message in zip(messages, sealed, strict=True):
        assert message[:4] == head
        assert len(message) == 4 + TAG_BYTES + len(body)
        assert (mode == "auth" or not body) == (message[4 + TAG_BYTES :] == body)
        assert unpack(head, message[4:], theirs) == body
    assert unpack(b"head", sealed[3][4:], theirs) is None  # once more
    assert unpack(b"head", sealed[1][4:], pair(mode)[1]) is None  # before its turn
    assert unpack(b"head", sealed[0][4:], ours) is None  # thrown back at its sender


@pytest.mark.parametrize("mode", SEALED)
def test_equal_messages_look_different(mode: Mode) -> None:
    ours, _ = pair(mode)
    assert len({pack(b"head", b"body", ours)[4 : 4 + TAG_BYTES] for _ in range(100)}) == 100


@pytest.mark.parametrize("mode", SEALED)
def test_every_bit_counts(mode: Mode) -> None:
    message = pack(b"head", b"body", pair(mode)[0])
    for bit in range(8 * len(message)):
        wrong = bytearray(message)
        wrong[bit // 8] ^= 1 << bit % 8
        assert unpack(bytes(wrong[:4]), bytes(wrong[4:]), pair(mode)[1]) is None


def agreed(dialler: Mode | None, listener: Mode | None, far: tuple[bool, bool], **more: Any) -> tuple[Any, Any]:
    hello = msgspec.structs.replace(HELLO, seal=dialler, far=far[0], **more)
    sides = Side(initiate(hello, SECRET, "rank 0")), Side(respond(Terms(SECRET, listener), "b", accept, far[1]))
    converse(*sides)
    return sides[0].outcome, sides[1].outcome


@pytest.mark.parametrize(
    ("dialler", "listener", "far", "encrypts"),
    [
        (None, None, (False, False), None),
        (None, None, (True, False), True),
        (None, None, (False, True), True),
        ("off", None, (True, True), None),
        (None, "off", (True, True), None),
        ("auth", None, (True, True), False),
        (None, "auth", (False, False), False),
        ("on", "on", (False, False), True),
    ],
)
def test_both_ends_agree(dialler: Mode | None, listener: Mode | None, far: tuple[bool, bool], encrypts: bool) -> None:
    outcomes = agreed(dialler, listener, far)
    seals = [outcome.seal for outcome in outcomes]
    if encrypts is None:
        assert seals == [None, None]
        return
    for one, other in (seals, seals[::-1]):
        message = pack(b"x", b"12345", one)
        assert unpack(b"x", message[1:], other) == b"12345"
        assert (b"12345" in message) is not encrypts


def test_unequal_settings_are_refused_with_both_named() -> None:
    outcomes = agreed("on", "auth", (True, True))
    for outcome in outcomes:
        assert isinstance(outcome, RefusedError)
        assert "rank 1 was started with --seal on and rank 0 with --seal auth; give every rank the same" in str(outcome)


def test_a_relay_is_not_sealed_twice() -> None:
    for outcome in agreed("on", "on", (True, True), purpose="relay", beyond=2):
        assert isinstance(outcome, Agreed)
        assert outcome.seal is None


def test_a_seal_needs_a_secret() -> None:
    with pytest.raises(ConfigError, match="--seal auth needs a secret, from which its keys come: set RING_SECRET"):
        configs(2, seal="auth")
    with pytest.raises(ConfigError, match=r"--seal \(or RING_SEAL\) is 'yes'; it must be one of on, auth, off"):
        RingConfig(seal="yes")  # type: ignore[arg-type]


# -- rings -------------------------------------------------------------------------------------

OPTIONS = {"segment_bytes": 64, "direct_bytes": 128}


def everything(ring: Ring) -> list[Any]:
    """Collectives of all kinds, and letters that come early; what they gave."""
    rank, size = ring.rank, ring.world_size
    found = [ring.all_reduce(contribution(1, rank, length, torch.float32)) for length in (0, 1, 7, 1000)]
    found += ring.all_gather(torch.full((rank + 3,), float(rank)))
    found.append(ring.broadcast_bytes(b"x" * 777 if rank == 0 else None))
    found.append(ring.gather_bytes(bytes([rank]) * 300 * rank, root=size - 1) or [])
    right, left = (rank + 1) % size, (rank - 1) % size
    for length in (3, 500):
        ring.send(torch.full((length,), float(rank)), right, tag=length)
    ring.barrier()
    for length in (500, 3):
        letter = torch.empty(length)
        ring.recv(letter, left, tag=length)
        found.append(letter)
    return found


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("mode", SEALED)
def test_a_sealed_ring_gives_what_an_open_one_does(mode: Mode, world_size: int) -> None:
    with thread_ring(world_size, options=OPTIONS) as rings:
        expected = each(rings, everything)
    with thread_ring(world_size, options=OPTIONS, secret=SECRET, seal=mode) as rings:
        assert all(link.seal is not None for ring in rings for link in ring._links.values())
        for ours, theirs in zip(each(rings, everything), expected, strict=True):
            assert all(map(same, ours, theirs))
        for _ in range(20):
            assert torch.equal(
                each(rings, lambda ring: ring.all_reduce(contribution(2, ring.rank, 8, torch.float16)))[0],
                expected_sum(2, world_size, 8, torch.float16),
            )


@pytest.mark.parametrize("mode", SEALED)
def test_every_bit_of_a_control_message_counts(mode: Mode) -> None:
    body = msgspec.msgpack.encode(Abort(1, "PeerLostError", "rank 1 failed", 1))
    message = pack(len(body).to_bytes(2, "little"), body, pair(mode)[0])
    for bit in (-1, *range(8 * len(message))):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            plane = ControlPlane(0, {1: Connection(ours, pair(mode)[1])}, ["rank 0", "rank 1"], Heartbeat())
            plane._on_failure = lambda error: None
            wrong = bytearray(message)
            if bit >= 0:
                wrong[bit // 8] ^= 1 << bit % 8
            theirs.sendall(wrong)
            theirs.shutdown(socket.SHUT_WR)  # a length that was made longer awaits more
            while plane._receive(plane._peers[1]):
                pass
            plane.close()
        assert isinstance(plane.failure, PeerLostError)
        assert plane.failure.rank == 1
        assert ("rank 1 failed" in str(plane.failure)) == (bit < 0)


def test_a_message_that_the_kernel_takes_in_part_goes_on_later() -> None:
    ours, theirs = socket.socketpair()
    one, other = pair("on")
    plane = ControlPlane(0, {1: Connection(ours, one)}, ["rank 0", "rank 1"], Heartbeat())
    peer = plane._peers[1]
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent = 0
    while not peer.outbox:
        peer.send(Beat(sent, True, b"x" * 32))
        sent += 1
    theirs.settimeout(0.1)
    stream = b""
    for more in range(3):
        with contextlib.suppress(TimeoutError):
            while True:
                stream += theirs.recv(1 << 16)
        peer.send(Beat(sent + more, True, b"x" * 32))
    found = []
    while len(stream) > 2:
        end = 2 + TAG_BYTES + int.from_bytes(stream[:2], "little")
        body = unpack(stream[:2], stream[2:end], other)
        assert body is not None
        found.append(msgspec.msgpack.decode(body)[1])
        stream = stream[end:]
    assert found == sorted(set(found))
    assert len(found) > sent
    plane._peers.clear()
    for sock in (ours, theirs):
        sock.close()
    plane.close()
