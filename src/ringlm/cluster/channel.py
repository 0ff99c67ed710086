"""Length-prefixed msgpack messages over a connected local socket: a frontend and its engine process."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from typing import Any, Generic, TypeVar

import msgspec

from ringlm.ring.seal import Connection
from ringlm.ring.stream import Stream

_Received = TypeVar("_Received")

MAX_FRAME_BYTES = 1 << 26
SEND_S = 60.0  # a process that is stopped for so long, while more is to be told than the kernel keeps, is given up


class ChannelClosed(Exception):
    """The process at the other end has ended, or closed its side."""


class Channel(Generic[_Received]):
    """Sends any message and receives those of `kind`. Any thread may send, and one receives."""

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        sock.settimeout(SEND_S)
        self._sock = sock
        self._stream: Stream[_Received] = Stream(Connection(sock), msgspec.msgpack.Decoder(kind), 4, MAX_FRAME_BYTES)
        self._received: deque[_Received] = deque()
        self._sending = threading.Lock()

    def send(self, *messages: msgspec.Struct) -> None:
        """Send messages in one write. Raises ChannelClosed, also where the other side reads nothing for SEND_S; the
        channel is of no use then."""
        frames = b"".join([self._stream.frame(message) for message in messages])
        with self._sending:
            try:
                self._sock.sendall(frames)
            except OSError as error:
                self._shut()  # what has gone may be half a message
                raise ChannelClosed(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> _Received | None:
        """The next message, or None after `timeout_s`. Raises ChannelClosed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._received:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                if not select.select([self._sock], [], [], left)[0]:
                    return None
                self._received += self._stream.receive()
            except (OSError, ValueError) as error:  # ValueError: no message, or it was closed here, by another thread
                raise ChannelClosed(str(error)) from error
        return self._received.popleft()

    def close(self) -> None:
        """End both directions; the other side reads the end of the stream."""
        self._shut()
        self._sock.close()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):  # the other side may have been first
            self._sock.shutdown(socket.SHUT_RDWR)
