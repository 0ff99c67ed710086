"""Messages in a stream: a length, then msgpack, sealed where the connection is. Knows no message, and no deadline."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from ringlm.errors import RingLMError
from ringlm.ring.seal import Connection, overhead, pack, unpack

_Message = TypeVar("_Message")
_PIECE_BYTES = 1 << 16


class Stream(Generic[_Message]):
    """One connection's, whose lengths have `head_bytes` and are `limit` at most. `buffer` is what has come and is not a
    whole message yet."""

    def __init__(
        self, connection: Connection, decoder: msgspec.msgpack.Decoder[_Message], head_bytes: int, limit: int
    ) -> None:
        self._sock, self._seal = connection
        self._decoder = decoder
        self._head_bytes = head_bytes
        self._limit = limit
        self.buffer = bytearray()

    def frame(self, message: msgspec.Struct) -> bytes:
        """A message as it is to be sent, next."""
        body = msgspec.msgpack.encode(message)
        return pack(len(body).to_bytes(self._head_bytes, "little"), body, self._seal)

    def receive(self) -> list[_Message]:
        """Read once; the messages that are whole now. Raises OSError, also at the end of the stream, and ValueError for
        what is no message, which says what the link does."""
        try:
            piece = self._sock.recv(_PIECE_BYTES)
        except BlockingIOError:
            return []
        if not piece:
            raise ConnectionResetError("the link was closed")
        self.buffer += piece
        messages = []
        while len(self.buffer) >= self._head_bytes:
            head = bytes(self.buffer[: self._head_bytes])
            length = int.from_bytes(head, "little")
            if length > self._limit:
                raise ValueError(f"announces a message of {length:,} bytes where {self._limit:,} are allowed")
            end = self._head_bytes + overhead(self._seal) + length
            if len(self.buffer) < end:
                break
            rest = bytes(self.buffer[self._head_bytes : end])
            del self.buffer[:end]
            body = unpack(head, rest, self._seal)
            if body is None:
                raise ValueError("damages what it carries")
            try:
                messages.append(self._decoder.decode(body))
            except (msgspec.MsgspecError, UnicodeDecodeError, RingLMError) as error:  # the last for what it says
                raise ValueError(f"brings a malformed message: {error}") from None
        return messages
