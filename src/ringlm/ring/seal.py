"""What keeps a link's bytes secret and whole: AES-GCM under the keys of its handshake, with counters as nonces.

What it does not know: how bytes move, and what they mean. Format in docs/protocol.md.
"""

from __future__ import annotations

import hmac
import socket
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

Mode = Literal["on", "auth", "off"]  # encrypted; readable, but authenticated; neither
MODES: tuple[Mode, ...] = ("on", "auth", "off")
TAG_BYTES = 16
_MAX_HEAD_BYTES = 64
_MAX_SIZES = 64


class Keys(NamedTuple):
    """What a handshake leaves: a key for each direction (32 bytes), and how many messages each has sealed."""

    send: bytes
    receive: bytes
    sent: int
    received: int


class Room(NamedTuple):
    """Memory for a sealed body and its tag."""

    whole: memoryview
    body: memoryview
    tag: memoryview


def cut(memory: memoryview) -> Room:
    """All of some memory as room for a body."""
    return Room(memory, memory[:-TAG_BYTES], memory[-TAG_BYTES:])


class Seal:
    """Seals what one end of a connection sends, and opens what it receives: a head, which stays readable, and a body,
    in the order in which they were sealed or not at all."""

    __slots__ = ("_damaged", "_incoming", "_opener", "_outgoing", "_received", "_sealer", "_sent", "_spare")

    def __init__(self, keys: Keys, encrypts: bool) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._damaged = InvalidTag
        self._sealer, self._opener = AESGCM(keys.send), AESGCM(keys.receive)
        self._sent, self._received = keys.sent, keys.received
        self._outgoing = _Memory() if encrypts else None
        self._incoming = _Memory() if encrypts else None
        self._spare = bytearray(_MAX_HEAD_BYTES + TAG_BYTES)

    def close(self, head: bytes, body: memoryview, room: Room | None = None) -> tuple[bytes | memoryview, memoryview]:
        """The tag of the next head and body, and what to send in the place of the body, which is as long. Both are in
        `room`, or last until the next call."""
        nonce = self._sent.to_bytes(12, "big")
        self._sent += 1
        if self._outgoing is None:
            return self._tag(self._sealer, nonce, head, body), body
        whole, sealed, tag = room or self._outgoing.cut(len(body))
        self._sealer.encrypt_into(nonce, body, head, whole)
        return tag, sealed

    def place(self, body: memoryview) -> memoryview:
        """Where to receive what came in the place of the next body, for which there is `body`."""
        return body if self._incoming is None else self._incoming.cut(len(body))[1]

    def open(
        self, head: bytes, tag: bytes | bytearray | memoryview, body: memoryview, room: Room | None = None
    ) -> bool:
        """Fill `body` from its `place`, or `room`; whether this is what was sealed. If not, anything may be in it."""
        nonce = self._received.to_bytes(12, "big")
        self._received += 1
        if self._incoming is None:
            return hmac.compare_digest(self._tag(self._opener, nonce, head, body), tag)
        whole, _, end = room or self._incoming.cut(len(body))
        end[:] = tag
        try:
            self._opener.decrypt_into(nonce, whole, head, body)
        except self._damaged:
            return False
        return True

    @property
    def encrypts(self) -> bool:
        """Whether what is sent is another thing than the body."""
        return self._outgoing is not None

    def _tag(self, cipher: AESGCM, nonce: bytes, head: bytes, body: memoryview) -> bytes:
        """The other way round, so that the body is authenticated where it lies: what the head becomes is not sent."""
        end = len(head) + TAG_BYTES
        cipher.encrypt_into(nonce, head, body, memoryview(self._spare)[:end])
        return bytes(self._spare[len(head) : end])


def overhead(seal: Seal | None) -> int:
    """Bytes that `pack` adds to a body."""
    return 0 if seal is None else TAG_BYTES


def pack(head: bytes, body: bytes, seal: Seal | None) -> bytes:
    """A small message as it is sent."""
    if seal is None:
        return head + body
    tag, sealed = seal.close(head, memoryview(body))
    return head + tag + sealed


def unpack(head: bytes, rest: bytes, seal: Seal | None) -> bytes | None:
    """The body of a message from what came behind its head, all of it; None if it is not what was sent."""
    if seal is None:
        return rest
    body = bytearray(rest[TAG_BYTES:])
    seal.place(memoryview(body))[:] = body
    return bytes(body) if seal.open(head, rest[:TAG_BYTES], memoryview(body)) else None


class _Memory:
    """The room for every sealed body."""

    def __init__(self) -> None:
        self._room = bytearray()
        self._cuts: dict[int, Room] = {}

    def cut(self, nbytes: int) -> Room:
        """For a body of that size."""
        found = self._cuts.get(nbytes)
        if found is None:
            if len(self._cuts) >= _MAX_SIZES or nbytes + TAG_BYTES > len(self._room):
                self._cuts.clear()
            if nbytes + TAG_BYTES > len(self._room):
                self._room = bytearray(nbytes + TAG_BYTES)
            found = self._cuts[nbytes] = cut(memoryview(self._room)[: nbytes + TAG_BYTES])
        return found


class Connection(NamedTuple):
    """A connected socket, past its handshake, and what seals its bytes, if they are sealed."""

    sock: socket.socket
    seal: Seal | None = None
