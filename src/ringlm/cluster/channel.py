"""Length-prefixed msgpack messages over a connected local socket: a frontend and its engine process."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from typing import Any, Generic, TypeVar

import msgspec

_Received = TypeVar("_Received")

MAX_FRAME_BYTES = 1 << 26


class ChannelClosed(Exception):
    """The process at the other end has ended, or closed its side."""


class Channel(Generic[_Received]):
    """Sends any message and receives those of `kind`. Any thread may send, and one receives."""

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        self._sock = sock
        self._decoder: msgspec.msgpack.Decoder[_Received] = msgspec.msgpack.Decoder(kind)
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()
        self._sending = threading.Lock()

    def send(self, *messages: msgspec.Struct) -> None:
        """Send messages in one write; waits while the other side reads nothing. Raises ChannelClosed."""
        bodies = [self._encoder.encode(message) for message in messages]
        frames = b"".join([part for body in bodies for part in (len(body).to_bytes(4, "little"), body)])
        with self._sending:
            try:
                self._sock.sendall(frames)
            except OSError as error:
                raise ChannelClosed from error

    def receive(self, timeout_s: float | None = None) -> _Received | None:
        """The next message, or None after `timeout_s`. Raises ChannelClosed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if len(self._buffer) >= 4:
                length = int.from_bytes(self._buffer[:4], "little")
                if length > MAX_FRAME_BYTES:
                    raise ChannelClosed(f"a frame of {length:,} bytes")
                if len(self._buffer) >= 4 + length:
                    body = bytes(self._buffer[4 : 4 + length])
                    del self._buffer[: 4 + length]
                    return self._decoder.decode(body)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                if not select.select([self._sock], [], [], left)[0]:
                    return None
                data = self._sock.recv(1 << 16)
            except (OSError, ValueError) as error:  # ValueError: it was closed here, by another thread
                raise ChannelClosed from error
            if not data:
                raise ChannelClosed
            self._buffer += data

    def close(self) -> None:
        """End both directions; the other side reads the end of the stream."""
        with contextlib.suppress(OSError):  # the other side may have been first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
