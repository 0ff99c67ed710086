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
from ringlm.ring.address import Address
from ringlm.ring.cards import Port, reached
from ringlm.ring.config import RingConfig
from ringlm.ring.gauge import Reading, gauge
from ringlm.ring.handshake import Hello, Place
from ringlm.ring.seal import Connection
from ringlm.ring.sockets import dial
from ringlm.ring.stream import Stream

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


def words(link: Connection) -> Stream[Word]:
    """What is said on a link."""
    return Stream(link, _decoder, 4, MAX_BYTES)


class Line:
    """This rank's link to rank 0 while it waits for a rank."""

    def __init__(self, link: Connection) -> None:
        self.sock = link.sock
        self._stream = words(link)
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
                try:
                    self._words += self._stream.receive()
                except ValueError as error:
                    raise ConnectError(f"the link to rank 0 {error}.") from None
                self._heard = time.monotonic()

    def say(self, word: msgspec.Struct) -> None:
        """A few hundred bytes; raises OSError when rank 0 does not read."""
        self.sock.sendall(self._stream.frame(word))

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
    return Line(dial(addresses, [hello], config, "rank 0", deadline))


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
