"""Bytes from the wire, spoilt: whatever comes, its reader raises an error of ringlm's, or takes it.

    python -m tests.fuzz [--count 1000000] [--seed 1] [--only NAME]

Seeded mutations of what ranks really send, for each reader; test_fuzz.py runs some thousands.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import socket
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec
import torch

from ringlm.cluster import joining
from ringlm.cluster.agreement import Capabilities
from ringlm.cluster.joining import Assignment, End, Gauge, Gauged, Member, Offer
from ringlm.cluster.memory import Memory
from ringlm.cluster.settings import Settings
from ringlm.engine.follower import _read, check
from ringlm.engine.messages import SequenceStep, StepMessage, StopMessage, encode
from ringlm.errors import RingError, RingLMError
from ringlm.ring import wire
from ringlm.ring.cards import Card, Chain
from ringlm.ring.control import ControlPlane, Heartbeat
from ringlm.ring.gauge import Reading
from ringlm.ring.handshake import MAGIC, PROTOCOL, Hello, Place, Terms, Welcome, initiate, respond
from ringlm.ring.lane import Lane
from ringlm.ring.link import Link
from ringlm.ring.mesh import Mesh
from ringlm.ring.peer import Abort, Beat, Bye
from ringlm.ring.seal import TAG_BYTES, Connection, Keys, Seal, pack, unpack
from ringlm.ring.sockets import tune

MOST_BYTES = 1 << 16  # of memory that a reader may take for one message, beyond what it was sent
CALL = wire.pack_call(1, 0, 0, wire.Operation.GATHER_BYTES, 0, 0, 0, 24)
SECRET = b"secret"


def pack_message(value: object, nbytes: int) -> bytes:
    """As handshakes, control links and chains frame their messages."""
    body = msgspec.msgpack.encode(value)
    return len(body).to_bytes(nbytes, "little") + body


HELLO = Hello("ring", 1, 0, 2, 0, "tiny:configuration=0123,weights=ab", -1, "auth", True)


class Reader(NamedTuple):
    """Something that reads bytes from the wire, and examples of what it is sent."""

    read: Callable[[bytes], object]
    examples: list[bytes]


def converse(side: object, data: bytes) -> None:
    """Feed one side of a handshake."""
    action = next(side)  # type: ignore[call-overload]
    with contextlib.suppress(StopIteration):
        while True:
            if isinstance(action, bytes):
                action = side.send(b"")  # type: ignore[attr-defined]
            else:
                assert action <= 2048, "memory beyond a message of a handshake"
                if len(data) < action:
                    return
                piece, data = data[:action], data[action:]
                action = side.send(piece)  # type: ignore[attr-defined]


def listener(secret: bytes | None) -> Callable[[bytes], None]:
    return lambda data: converse(respond(Terms(secret), "a stranger", lambda hello: 0), data)


def dialler(secret: bytes | None) -> Callable[[bytes], None]:
    return lambda data: converse(initiate(HELLO, secret, "a stranger"), data)


def sent(data: bytes) -> socket.socket:
    """A socket from which `data` comes, and then the end."""
    ours, theirs = socket.socketpair()
    theirs.sendall(data)
    theirs.close()
    return ours


def seal() -> Seal:
    return Seal(Keys(b"1" * 32, b"1" * 32, 0, 0), True)


def frames(make: Callable[[], Seal] | None) -> Callable[[bytes], None]:
    """A rank that expects a message of known size, then one of the sender's, then any."""

    def read(data: bytes) -> None:
        with sent(data) as sock:
            tune(sock)
            link = Link(Connection(sock, make() if make is not None else None), 1, "rank 1")
            lane, into = Lane(link, CALL, 16, 0), memoryview(bytearray(24))
            lane.receive(into)
            lane.receive_sized(room)
            lane.receive_sized(room)
            Mesh.pump([lane], time.perf_counter() + 5.0)

    return read


def room(nbytes: int) -> memoryview:
    if nbytes > MOST_BYTES:
        raise ValueError("more than was to be expected")
    return memoryview(bytearray(nbytes))


def framed(seal: Seal | None, *bodies: bytes) -> bytes:
    data = b""
    for body in bodies:
        call = wire.resized(CALL, len(body))
        for start in range(0, len(body) or 1, 16):
            part = body[start : start + 16]
            data += call + wire.digest(part) + part if seal is None else pack(call, part, seal)
    return data


def letter(nbytes: int) -> bytes:
    call = wire.pack_call(7, 0, 0, wire.Operation.SEND, 0, 0, 1, nbytes)
    return call + wire.digest(bytes(nbytes)) + bytes(nbytes)


def control(data: bytes) -> None:
    with sent(data) as sock:
        plane = ControlPlane(0, {1: Connection(sock)}, ["rank 0", "rank 1"], Heartbeat())
        plane._on_failure = lambda error: None
        peer = plane._peers[1]
        while plane._receive(peer):
            assert len(peer.stream.buffer) < 2 * MOST_BYTES
        wire.contradict(CALL, peer.call)
        wire.mismatch(0, CALL, "rank 1", peer.call)
        plane.close()
        if plane.failure is not None and "malformed" in str(plane.failure):
            raise plane.failure


def cards(data: bytes) -> None:
    with sent(data) as sock:
        Chain(1, 2, Connection(sock), None, time.monotonic() + 5.0).share(CARD, Card)


def words(make: Callable[[], Seal] | None) -> Callable[[bytes], None]:
    """Who takes in a rank, or waits to be taken in."""

    def read(data: bytes) -> None:
        with sent(data) as sock:
            stream = joining.words(Connection(sock, make() if make is not None else None))
            with contextlib.suppress(ConnectionResetError):
                while True:
                    try:
                        stream.receive()
                    except ValueError as error:
                        raise RingError(str(error)) from error

    return read


def said(words: Iterable[msgspec.Struct], seal: Seal | None) -> bytes:
    stream = joining.words(Connection(socket.socket(), seal))
    return b"".join([stream.frame(word) for word in words])


def step(data: bytes) -> None:
    message = _read(data)
    if isinstance(message, StepMessage):
        check(message, context=64, vocabulary=100, blocks=2, block=64)


def sealed(data: bytes) -> None:
    if len(data) < 4 + TAG_BYTES or unpack(data[:4], data[4:], seal()) is None:
        raise RingError("refused")


PLACE = Place(["192.168.1.11", "127.0.0.1"], 7600, "network")
CARD = Card(0, PLACE, ("192.168.1.12", 7600), "machine")
ABLE = Capabilities(1, "cpu", ["float32"], Settings(dtype="float32"), Memory("machine", 1 << 33), "a processor")
WORDS = [
    [Offer("demo", 2), joining.Beat(), Assignment(1, 2, 3, [("192.168.1.11", 7600)])],
    [Member(1, 2, PLACE, ABLE), joining.Beat(), End("rank 0 has ended.")],
    [Gauge([("192.168.1.11", 7600)]), Gauged(Reading("192.168.1.12", ("192.168.1.11", 7600), 1e-4, 1e9, 1e9))],
]
PREAMBLES = [MAGIC + bytes((PROTOCOL, flag)) for flag in (0, 1)]
READY = b"\x05\x00ready"
BODIES = b"x" * 24, b"y" * 40, b""
ABORT = Abort(1, "PeerLostError", "rank 1 failed: out of memory", 1)
BEATS = [Beat(7, True, CALL, 12.5, None), Beat(8, False, b"", 13.5, 12.0), ABORT, Bye()]
PART = SequenceStep(1, 0, [3, 4], [0], [1])

READERS = {
    "hello": Reader(listener(None), [PREAMBLES[0] + pack_message(HELLO, 2) + READY]),
    "hello of a secret": Reader(listener(SECRET), [PREAMBLES[1] + (90).to_bytes(2, "little") + bytes(range(90))]),
    "welcome": Reader(
        dialler(None),
        [PREAMBLES[0] + pack_message(w, 2) for w in (Welcome(0), Welcome(0, "no", join=PLACE), Welcome(0, seal="on"))],
    ),
    "welcome of a secret": Reader(dialler(SECRET), [PREAMBLES[1] + (64).to_bytes(2, "little") + bytes(range(64))]),
    "frame": Reader(frames(None), [framed(None, *BODIES), letter(9) + framed(None, *BODIES), letter(0) + letter(50)]),
    "sealed frame": Reader(frames(seal), [framed(seal(), *BODIES)]),
    "sealed message": Reader(sealed, [pack(b"head", b"body" * 5, seal())]),
    "control": Reader(control, [b"".join(pack_message(beat, 2) for beat in BEATS), pack_message(BEATS[0], 2)]),
    "cards": Reader(cards, [pack_message([CARD], 4) + pack_message([CARD, CARD], 4)]),
    "words": Reader(words(None), [said(some, None) for some in WORDS]),
    "sealed words": Reader(words(seal), [said(some, seal()) for some in WORDS]),
    "step": Reader(step, [encode(StepMessage(0, 0, [PART, PART], candidates=3)), encode(StopMessage(0, 1))]),
}


def mutated(example: bytes, dice: random.Random) -> bytes:
    """Some bits, bytes, lengths and places changed; rarely nothing."""
    data = bytearray(example)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        at = dice.randrange(len(data) + 1)
        kind = dice.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = dice.choice((0, 1, 0x7F, 0x80, 0xC1, 0xDD, 0xDF, 0xFF))
        elif kind == 2:
            data[at:at] = dice.randbytes(dice.choice((1, 2, 8, 100)))
        elif kind == 3:
            del data[at : at + dice.choice((1, 2, 8, 100))]
        elif kind == 4:
            data[at : at + 8] = dice.choice((0, 2**31, 2**32 - 1, 2**63, 2**64 - 1)).to_bytes(8, "little")
        else:
            start = dice.randrange(len(data) + 1)
            data[at:at] = data[start : start + dice.randrange(64)]
    if len(data) >= wire.CALL_BYTES and dice.randrange(4) == 0:  # what a CRC would stop is let through
        data[: wire.CALL_BYTES] = wire.resized(bytes(data[: wire.CALL_BYTES]), dice.choice((0, 24, 4096, 1 << 62)))
    return bytes(data)


def fuzz(names: Iterable[str], count: int, seed: int) -> dict[str, int]:
    """`count` inputs to all of `names`, in equal parts; how many each refused. Raises what no reader may raise."""
    refused = dict.fromkeys(names, 0)
    for name in refused:
        reader, dice = READERS[name], random.Random(f"{name} {seed}")
        for turn in range(count // len(refused)):
            data = mutated(dice.choice(reader.examples), dice) if turn % 8 else dice.randbytes(dice.randrange(200))
            try:
                reader.read(data)
            except RingLMError as error:
                refused[name] += "\n" not in str(error)  # which are one line
            except Exception as error:
                raise AssertionError(f"{name} met {error!r} in {data.hex()}") from error
    return refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=READERS, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fuzz(READERS, 100 * len(READERS), options.seed)  # what is imported and compiled late is there now
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    refused = fuzz([options.only] if options.only else READERS, options.count, options.seed)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    for name, number in refused.items():
        print(f"{name:20} {number:,} refused of {options.count // len(refused):,}")
    print(f"{time.perf_counter() - started:.0f} s; the most memory held grew by {grown / 1024:.1f} MB")


if __name__ == "__main__":
    main()
