"""The other end of a control link: the messages, as it sends and reads them, and what they have told of its rank.

What it does not know: what is done about a rank that is silent or stuck (`control`). Format in docs/protocol.md.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Annotated

import msgspec

from ringlm.ring import wire
from ringlm.ring.seal import Connection
from ringlm.ring.stream import Stream

MAX_CONTROL_BYTES = 8192
MAX_TRAFFIC = 256  # links that a beat tells of; with 28 bytes each they fit into a message


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """Alive. `progress` counts steps; `busy`: computing, so the count should grow; `call` is that of
    the collective this rank is in, or empty. `clock` is the sender's, in seconds, and `echo` the receiver's, as the
    sender knows it by the last beat from there: what that clock is ahead of it is the round trip. `computed` adds up
    the seconds that steps took outside of collectives. `traffic` is that of the sender's data links to ranks above it,
    as (rank, bytes sent, received), which rank 0 cannot know otherwise."""

    progress: int
    busy: bool
    call: Annotated[bytes, msgspec.Meta(max_length=wire.CALL_BYTES)] = b""
    clock: float = 0.0
    echo: float | None = None
    computed: float = 0.0
    traffic: Annotated[list[tuple[int, int, int]], msgspec.Meta(max_length=MAX_TRAFFIC)] = []


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """The ring has ended because of `rank`, as `reporter` saw. `kind` names a PeerError."""

    rank: int
    kind: str
    text: str
    reporter: int


class Bye(msgspec.Struct, frozen=True, array_like=True, tag="bye"):
    """This rank leaves in order."""


Message = Beat | Abort | Bye
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Peer:
    """What is known of the rank at the other end of a control link."""

    def __init__(self, connection: Connection, rank: int, name: str, heard: float, relayed: bool) -> None:
        self.sock = connection.sock
        self.rank = rank
        self.name = name
        self.heard = heard
        self.moved = heard  # when its counter last grew, or it was idle
        self.call = b""
        self.traffic: list[tuple[int, int, int]] = []
        self.offset: float | None = None  # of its clock to ours, less the way of its last beat
        self.round_trip_s: float | None = None
        self.left = False
        self.relayed = relayed
        self.ended = math.inf  # when its link did
        self.stream = Stream(connection, _decoder, 2, MAX_CONTROL_BYTES)
        self.outbox = b""  # what is left of a message that the kernel took in part
        self._progress = -1
        self.sock.setblocking(False)

    def send(self, message: Message) -> None:
        """A peer that reads nothing loses messages, and is found by its own silence."""
        with contextlib.suppress(OSError):
            if self.outbox:
                self.outbox = self.outbox[self.sock.send(self.outbox) :]
            if not self.outbox:
                self.outbox = self.stream.frame(message)
                self.outbox = self.outbox[self.sock.send(self.outbox) :]

    def receive(self) -> list[Message]:
        """What has come, beats being noted. Raises OSError at the link's end, and ValueError, which says what the link
        does, for what is no message."""
        messages = self.stream.receive()
        for message in messages:
            self.heard = time.monotonic()
            if isinstance(message, Beat):
                self._note(message)
            elif isinstance(message, Bye):
                self.left = True
        return messages

    def _note(self, beat: Beat) -> None:
        if beat.progress != self._progress or not beat.busy:
            self._progress, self.moved = beat.progress, self.heard
        self.call, self.traffic = beat.call, beat.traffic
        self.offset = beat.clock - self.heard
        if beat.echo is not None:
            self.round_trip_s = self.heard - beat.echo

    def close(self) -> None:
        """What is closed unread is answered by a reset, which may overtake our last words: it is read."""
        with contextlib.suppress(OSError):
            while self.sock.recv(MAX_CONTROL_BYTES):
                pass
        self.sock.close()
