"""Joining a ring: dial its rank 0, say what one is, and wait to be given a rank. And the words that are spoken.

What it does not know: who is chosen (rendezvous.py), how the ring then forms.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from ringlm.cluster.agreement import Capabilities
from ringlm.cluster.examination import Findings
from ringlm.errors import ConfigError, ConnectError, PeerLostError, RingError
from ringlm.ring.address import Address, interface_address
from ringlm.ring.cards import Port, reached
from ringlm.ring.config import RingConfig
from ringlm.ring.gauge import Reading, gauge
from ringlm.ring.handshake import Handshake, Hello, Place, initiate
from ringlm.ring.seal import Connection, Seal, overhead, pack, unpack
from ringlm.ring.sockets import dial

BEAT_S = 1.0
SILENCE_S = 5.0
MAX_BYTES = 1 << 16
_PAUSE_S = 0.1


class Offer(msgspec.Struct, frozen=True, array_like=True, tag="offer"):
    """Rank 0's first word: the model as its user named it, how many ranks there are to be, and whether all are there,
    so that who joins now is a spare. Who only `examines` machines forms no ring, and has no model."""

    model: str
    world_size: int
    complete: bool = False
    examines: bool = False


class Member(msgspec.Struct, frozen=True, array_like=True, tag="member"):
    """Who joins: the rank and the epoch that it had last (-1 and 0 for none), where it listens, what it can do; and
    what was found of its machine, for who examines."""

    rank: int
    epoch: int
    place: Place
    capabilities: Capabilities
    findings: Findings | None = None


class Assignment(msgspec.Struct, frozen=True, array_like=True, tag="seat"):
    """A place in the next ring; `right` is where its right neighbour listens, in this rank's network."""

    rank: int
    world_size: int
    epoch: int
    right: list[tuple[str, Port]]


class End(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """There will be no ring for this one; by a `mistake` in what its user has told it."""

    why: str
    mistake: bool = False


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """Alive. Sent by both sides, every second."""


class Gauge(msgspec.Struct, frozen=True, array_like=True, tag="gauge"):
    """Rank 0 wants the link to another that waits to be measured, who listens at one of these addresses."""

    addresses: list[tuple[str, Port]]


class Gauged(msgspec.Struct, frozen=True, array_like=True, tag="gauged"):
    """The answer to it; `reading` None: `why` there is none."""

    reading: Reading | None
    why: str = ""

    @classmethod
    def by(cls, config: RingConfig, word: Gauge) -> Gauged:
        """Measure the link. What keeps that from being done is in the answer."""
        try:
            return cls(gauge([Address(*one) for one in word.addresses], config))
        except RingError as error:
            return cls(None, str(error))


Word = Offer | Member | Assignment | End | Beat | Gauge | Gauged
_decoder: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)


def frame(word: msgspec.Struct, seal: Seal | None) -> bytes:
    """A word as it is sent: its length (4 bytes), then msgpack, sealed as the link is."""
    body = msgspec.msgpack.encode(word)
    return pack(len(body).to_bytes(4, "little"), body, seal)


class Inbox:
    """What has come by one link, and is not a whole word yet."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._buffer = b""

    def receive(self) -> list[Word]:
        """The words that are there. Raises OSError at the link's end, and ConnectError for anything else."""
        try:
            data = self._link.sock.recv(MAX_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError("the link was closed")
        self._buffer += data
        words = []
        while len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[:4], "little")
            if length > MAX_BYTES:
                raise ConnectError(f"a word of {length:,} bytes was announced where {MAX_BYTES:,} are allowed.")
            end = 4 + overhead(self._link.seal) + length
            if len(self._buffer) < end:
                break
            head, rest, self._buffer = self._buffer[:4], self._buffer[4:end], self._buffer[end:]
            body = unpack(head, rest, self._link.seal)
            if body is None:
                raise ConnectError("the link damages what it carries.")
            try:
                words.append(_decoder.decode(body))
            except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError) as error:  # the last for settings
                raise ConnectError(f"a malformed word was sent: {error}") from None
        return words


class Line:
    """This rank's link to rank 0 while it waits for a rank."""

    def __init__(self, link: Connection) -> None:
        self.sock = link.sock
        self._seal = link.seal
        self._inbox = Inbox(link)
        self._words: list[Word] = []
        self._heard = time.monotonic()
        self._due = 0.0
        self.sock.setblocking(False)

    def hear(self, deadline: float = math.inf) -> Word:
        """The next word but beats; says meanwhile that this rank is alive. Raises OSError when rank 0 is gone, and at
        the deadline, and ConnectError for what is no word."""
        while True:
            while self._words:
                word = self._words.pop(0)
                if not isinstance(word, Beat):
                    return word
            now = time.monotonic()
            if now > deadline or now - self._heard > SILENCE_S:
                raise TimeoutError("it is silent")
            if now >= self._due:
                self._due = now + BEAT_S
                self.say(Beat())
            if select.select([self.sock], [], [], max(0.0, self._due - now))[0]:
                self._words += self._inbox.receive()
                self._heard = time.monotonic()

    def say(self, word: msgspec.Struct) -> None:
        """A few hundred bytes; raises OSError when rank 0 does not read."""
        self.sock.sendall(frame(word, self._seal))

    def close(self) -> None:
        self.sock.close()


class Seat(NamedTuple):
    """A rank in the next ring, and where its right neighbour listens."""

    rank: int
    world_size: int
    epoch: int
    right: list[Address]


def call(
    addresses: Sequence[Address],
    config: RingConfig,
    fingerprint: str = "",
    *,
    rank: int = -1,
    epoch: int = 0,
    deadline: float,
) -> Line:
    """A line to rank 0 at one of `addresses`. Raises ConnectError, of which RefusedError is final, and
    AuthenticationError."""
    hello = Hello("join", rank, 0, 0, epoch, fingerprint, seal=config.seal)

    def handshake(name: str, far: bool) -> Handshake:
        return initiate(msgspec.structs.replace(hello, far=far), config.secret, name)

    source = interface_address(config.interface) if config.interface else None
    return Line(dial(list(addresses), handshake, "rank 0", deadline, source=source))


def join(
    addresses: Sequence[Address],
    config: RingConfig,
    fingerprint: str,
    member: Callable[[int, int, socket.socket], Member],
    *,
    rank: int = -1,
    epoch: int = 0,
    timeout_s: float,
) -> Seat:
    """Join the ring whose rank 0 listens at one of `addresses`, and wait for a seat. A rank 0 that ends is dialled
    again, for `timeout_s` each time. `member` is what to say of this rank, given `rank`, `epoch` and its link.

    Raises ConnectError, AuthenticationError, PeerLostError when rank 0 says that it is over, and ConfigError when it
    does not want this one.
    """
    while True:
        deadline = time.monotonic() + timeout_s
        line = call(addresses, config, fingerprint, rank=rank, epoch=epoch, deadline=deadline)
        try:
            line.say(member(rank, epoch, line.sock))
            while True:
                word = line.hear()
                if isinstance(word, Gauge):
                    line.say(Gauged.by(config, word))
                if isinstance(word, Assignment):
                    right = [Address(*one) for one in word.right]
                    if word.rank == word.world_size - 1:  # whose right neighbour is rank 0, which was reached before
                        right = list(dict.fromkeys([reached(line.sock, list(addresses)), *right]))
                    return Seat(word.rank, word.world_size, word.epoch, right)
                if isinstance(word, End) and word.mistake:
                    raise ConfigError(word.why)
                if isinstance(word, End) and timeout_s < math.inf:
                    raise PeerLostError(word.why, 0)
        except OSError:
            time.sleep(_PAUSE_S)  # rank 0 is gone, and may come back
        finally:
            with contextlib.suppress(OSError):
                line.close()
